"""Every configuration key, its type and its default. No other file holds a default.

Keys are spelt as in Megatron, NeMo and the SPIN paper. A field whose default is
`MISSING` must be given. Fields typed `Any` accept a scalar or a list with one value
for each iteration; `nemo_spin.config.validate` checks them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from omegaconf import MISSING


@dataclass
class SchedConfig:
    """Learning-rate schedule of one iteration; it restarts with each."""

    name: str = "linear"  # linear | cosine | constant; after the warm-up
    warmup_ratio: float = 0.1  # share of the iteration's optimizer steps
    min_lr_ratio: float = 0.0  # final learning rate as a share of the peak


@dataclass
class OptimConfig:
    """Optimizer; the peak learning rate is `spin.lr` (or `sft.lr`)."""

    name: str = "rmsprop"  # rmsprop | adam (AdamW: decay is decoupled)
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adam
    eps: float = 1e-8
    alpha: float = 0.99  # rmsprop: smoothing of the squared gradient
    clip_grad: float = 1.0  # global gradient norm; 0 turns clipping off
    carry_over: bool = False  # an iteration starts from the optimizer state (no weights) of the one before
    sched: SchedConfig = field(default_factory=SchedConfig)


@dataclass
class LoraConfig:
    """Low-rank adapters: train A and B of W + alpha / rank * B A, with W frozen."""

    rank: int | None = None  # null: no adapters, all weights are trained
    alpha: float = 32.0  # updates are scaled by alpha / rank
    dropout: float = 0.0  # of the adapters' inputs, while training
    target_modules: list[str] | None = None  # of q_proj, k_proj, v_proj, o_proj, gate_proj, ...; null: all
    export_adapter: bool = False  # also write what was learned since theta_0 as `peft` does


@dataclass
class ModelConfig:
    """The policy: theta_0 and how Megatron holds and trains it."""

    path: str = MISSING  # Hugging Face directory (or hub id) of theta_0
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None  # interleaved chunks per rank; null: one
    num_layers_in_first_pipeline_stage: int | None = None  # null: an equal share, as of the last one
    num_layers_in_last_pipeline_stage: int | None = None
    account_for_embedding_in_pipeline_split: bool = False  # it takes a layer's place in the first stage
    account_for_loss_in_pipeline_split: bool = False  # the head takes one in the last stage
    context_parallel_size: int = 1  # ranks that share a row's positions
    expert_model_parallel_size: int = 1
    sequence_parallel: bool = False
    transformer_impl: str = "auto"  # auto | transformer_engine | local
    fp8: str | None = None  # null | hybrid (e4m3, gradients e5m2) | e4m3: matrix products in 8 bits
    fp8_recipe: str = "tensorwise"  # tensorwise | delayed | blockwise | mxfp8: how 8-bit scales are chosen
    packing: str = "shared_prompt"  # shared_prompt | pairs | none (padded sequences)
    micro_batch_tokens: int = 4096  # most token positions of a packed microbatch; a longer unit is alone
    # Units: a prompt, its demonstration and the num_generations answers that make its pairs
    micro_batch_size: int = 4  # units per microbatch and data-parallel rank, without packing
    global_batch_size: int = 64  # units per optimizer step
    recompute_granularity: str | None = None  # null | selective | full
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])  # | mlp; selective
    recompute_method: str = "uniform"  # uniform: all, some at a time | block: the first of a stage; full
    recompute_num_layers: int = 1  # at a time (uniform), or per stage and chunk (block); full
    overlap_grad_reduce: bool = False  # sum gradients over replicas during the last backward pass
    overlap_param_gather: bool = False  # gather the distributed optimizer's weights during a forward pass
    use_distributed_optimizer: bool | None = None  # null: with data parallelism
    optimizer_cpu_offload: bool = False  # adam on GPUs: a share of its state and updates on the CPU
    optimizer_offload_fraction: float = 1.0  # that share
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class GatesConfig:
    """The three gates of an iteration; a tolerance of null turns a gate off."""

    ln2_tolerance: float | None = 1e-3  # |first loss - its value at margin 0|; bf16 has rounding added
    # Of responses the mean of |sum of sampler - Megatron| / tokens, in nats; null: by precision
    sampler_tolerance: float | None = None
    sampler: bool = True
    export: bool = True  # read every export back and compare bit for bit


@dataclass
class SpinConfig:
    """Self-play. Fields typed Any take one value, or a list with one for each iteration."""

    iterations: int = 3
    loss: str = "logistic"  # logistic | hinge | exponential | correlation | ipo | nca | PLACE:FUNCTION
    length_normalized: bool = False  # mean over response tokens in place of their sum; beta grows accordingly
    label_smoothing: float = 0.0  # share of pairs taken to be labelled the wrong way round
    sft_weight: float = 0.0  # of the real responses' negative log-likelihood, nats per token
    dpop_weight: float = 0.0  # of a penalty where real log-probabilities fall below the opponent's
    opponent_mix: float = 0.0  # alpha-SPIN: weight of theta_0 in the opponent of the loss
    beta: Any = 0.1
    lr: Any = 5e-7
    epochs: Any = 2
    max_steps: Any = None  # optimizer steps to stop after, of the schedule over all epochs; null: all
    num_prompts: Any = None  # training prompts that are answered, drawn at random; null: all
    history: int = 1  # how many earlier iterations' generations are mixed in
    # How much of each age, its own first: a share of the prompts up to 1, or their number; null: all
    mixture: list[float] | None = None
    # Number of an iteration -> {dotted key: value} of what differs in it: model.optim.*, sampling
    per_iteration: dict[str, Any] = field(default_factory=dict)
    gates: GatesConfig = field(default_factory=GatesConfig)


@dataclass
class Thresholds:
    """When a guard warns and when it ends the loop; null: never."""

    warn: float | None = None
    stop: float | None = None


@dataclass
class GuardsConfig:
    """What is watched; `selfplay/guards.py` says what each number is."""

    window_steps: int = 10
    # Over steps, as means of the last `window_steps`
    # of real log-probabilities below the opponent's, nats per token
    real_fall: Thresholds = field(default_factory=partial(Thresholds, 0.01, 0.5))
    margin_saturated: Thresholds = field(default_factory=partial(Thresholds, 10.0))  # mean margin
    # Over the answers of an opponent
    empty_share: Thresholds = field(default_factory=partial(Thresholds, 0.02, 0.9))  # of the answers
    repetitive_share: Thresholds = field(default_factory=partial(Thresholds, 0.1))  # mostly repetition
    duplicate_share: Thresholds = field(default_factory=partial(Thresholds, 0.5))  # of another sample
    distinct_share: Thresholds = field(default_factory=partial(Thresholds, 0.2))  # or fewer different ones
    cut_share: Thresholds = field(default_factory=partial(Thresholds, 0.5))  # by generation.max_tokens
    eos_share: Thresholds = field(default_factory=partial(Thresholds, 0.5))  # or fewer that end
    length_drift: Thresholds = field(default_factory=partial(Thresholds, 2.0))  # factor from real lengths
    equal_share: Thresholds = field(default_factory=partial(Thresholds, 0.8, 0.98))  # the demonstration
    equal_fall: Thresholds = field(default_factory=partial(Thresholds, 0.05))  # of that share
    # Over a scoring, a training and an evaluation
    sampler_difference: Thresholds = field(default_factory=partial(Thresholds, 0.1))  # nats per token
    heldout_fall: Thresholds = field(default_factory=partial(Thresholds, 0.01, 0.5))  # as real_fall
    score_drop: Thresholds = field(default_factory=partial(Thresholds, 0.02, 0.2))  # relative


@dataclass
class SelfplayConfig:
    """When the loop ends before its time, and which model it keeps."""

    stop: bool = True  # false: guards only warn (not-a-number always stops)
    # best: by the score of sampled held-out answers alone; by that of greedy ones where none are sampled
    # (evaluation.sampled=false); by held-out real log-probability where nothing is scored | last
    keep: str = "best"
    guards: GuardsConfig = field(default_factory=GuardsConfig)


@dataclass
class SftConfig:
    """Plain fine-tuning on the real responses (`nemo-spin sft`)."""

    output: str = MISSING  # run directory of the fine-tuning; its `model/` is the result
    lr: float = 1e-5
    epochs: int = 1
    max_steps: int | None = None  # optimizer steps; null: as many as the epochs have


@dataclass
class ExportConfig:
    """A checkpoint that is no iteration's (`nemo-spin export`)."""

    checkpoint: str | None = None  # Megatron distributed checkpoint (a pickle says what is where: of
    # people you trust); null: that of an iteration
    output: str = MISSING  # Hugging Face directory to write; with `checkpoint` only


@dataclass
class DataConfig:
    """Demonstrations and how they become token ids (once, for all iterations)."""

    train: str = MISSING  # parquet, JSON or JSONL file, or a hub dataset id
    heldout: str | None = None  # the same; null: no held-out metrics
    train_split: str = "train"  # split of a hub dataset
    heldout_split: str = "test"
    subset: str | None = None  # configuration name of a hub dataset
    revision: str | None = None  # branch, tag or commit of a hub dataset; null: the newest
    format: str = "messages"  # messages | prompt_response | spin
    use_generations: bool = False  # spin: iteration 0 takes the data's `generated` answers, and samples none
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    response_column: str = "response"
    id_column: str | None = None  # null: a hash of the row's content
    first_round_only: bool = False  # messages: keep the first prompt and its answer
    prompt_template: str | None = None  # with {prompt}; null: the tokenizer's chat template
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # e.g. {enable_thinking: false}
    system_prompt: str | None = None  # added where a conversation has none
    max_prompt_length: int = 1024  # tokens
    max_response_length: int = 1024  # tokens, EOS included
    overlong_prompt: str = "quarantine"  # quarantine | truncate_left
    overlong_response: str = "truncate"  # truncate | quarantine
    max_quarantined_share: float = 0.05  # of all rows; more stops the run
    max_rows: int | None = None  # the first rows only
    num_workers: int | None = None  # processes that tokenize; null: one per core


@dataclass
class GenerationConfig:
    """How the opponent answers the training prompts."""

    engine: str = "vllm"  # vllm | vllm_server: one that is running, at `server`
    # Such as http://127.0.0.1:8000, started with VLLM_SERVER_DEV_MODE=1 and for this run alone. It
    # takes orders from whoever reaches it: the loopback interface or a trusted network, nothing else.
    server: str | None = None
    server_timeout_s: float = 600.0  # for each call to it; NEMO_SPIN_SERVER_KEY holds its key, if it has one
    python: str | None = None  # interpreter of the worker; null: this one, else .venv-vllm
    num_generations: int = 1  # per prompt
    temperature: Any = 1.0  # evaluations draw as iteration 0 does, for every model
    top_p: Any = 1.0
    top_k: int = 0  # 0: off
    max_tokens: int = 256  # answers are cut there, without an end: let most demonstrations be shorter
    stop_token_ids: list[int] = field(default_factory=list)  # besides the model's EOS
    tensor_parallel_size: int = 1
    replicas: int = 1  # samplers at work at the same time, with as many devices each
    replica_attempts: int = 5  # of several: deaths without a shard in between, until it is given up
    lease_timeout_s: float = 120.0  # of several: without a sign of life for so long, its shard is another's
    shard_rows: int = 512  # prompts per shard
    max_num_seqs: int = 256
    kv_cache_gib: float | None = None  # null: from the model and max_num_seqs (CPU), vLLM's own (GPU)
    dtype: str = "auto"  # auto: as trained (trainer.precision)
    # auto | always | never: an engine lives on and gets the next model's weights. With auto
    # it ends before training on a GPU, and on a CPU where it holds much memory.
    keep_engine: str = "auto"
    adapters: bool = False  # with model.lora.export_adapter: theta_0 stays loaded, adapters change
    load_timeout_s: float = 1800.0
    shard_timeout_s: float = 3600.0


@dataclass
class TrainerConfig:
    """Lightning's trainer, as far as it is not decided by Megatron."""

    devices: int = 1  # ranks per node
    num_nodes: int = 1
    accelerator: str = "auto"  # auto | gpu | cpu
    precision: str = "auto"  # auto (bf16 on GPU, 32 on CPU) | 32 | bf16
    log_every_n_steps: int = 1
    val_check_interval: int | None = None  # optimizer steps; null: at the end of the iteration
    save_interval: int | None = 50  # optimizer steps between resume checkpoints; null: none
    save_top_k: int = 2  # how many of the newest stay; the last is always one of them
    async_save: bool = False  # training goes on while a checkpoint is written


@dataclass
class CheckpointCallbackConfig:
    """Of NeMo's checkpoint callback the keys that mean something here."""

    save_nemo_on_train_end: bool = False  # write train/policy.nemo of every iteration


@dataclass
class ExpManagerConfig:
    """Loggers, through NeMo's exp_manager."""

    create_tensorboard_logger: bool = True
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)


@dataclass
class SlurmConfig:
    """The job that `nemo-spin slurm` writes; its nodes and tasks are `trainer`'s num_nodes and devices."""

    job_name: str | None = None  # null: the top-level name
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None  # limit of one job, such as 04:00:00; null: the partition's
    gpus_per_node: int | None = None  # null: trainer.devices, none with trainer.accelerator=cpu; 0: none
    cpus_per_task: int | None = None
    options: list[str] = field(default_factory=list)  # more of sbatch's, such as --exclusive or --mem=0
    modules: list[str] = field(default_factory=list)  # `module load` them
    environment: dict[str, Any] = field(default_factory=dict)  # variables of the job and of all ranks
    python: str | None = None  # interpreter of the ranks; null: this one, and `python` in a container
    container_image: str | None = None  # for the ranks and the sampler; null: none
    container_runtime: str = "pyxis"  # pyxis (srun --container-image) | apptainer | singularity
    container_mounts: list[str] = field(default_factory=list)  # SOURCE:TARGET; the run directory always is
    signal_s: int = 300  # seconds before the limit at which the run is told to save and leave
    requeue: bool = True  # a job that has saved, or lost a node, is put back into the queue
    continuation: bool = True  # a job that depends on this one goes on where it was cut off


@dataclass
class LauncherConfig:
    """How the processes of a stage are started."""

    name: str = "local"  # local | slurm (inside an allocation) | external (torchrun, mpirun, srun)
    timeout_s: float = 86400.0  # a stage's processes are ended after so long without progress
    collective_timeout_s: float = 1800.0  # for a rank to enter a phase, or a collective, that others entered
    hang_timeout_s: float = 600.0  # ranks are ended when one gives no sign of life for so long
    attempts: int = 3  # of a stage that fails by what may pass, with no new checkpoint or shard in between
    backoff_s: float = 10.0  # before the second attempt; doubled for each further one
    preemption_grace_s: float = 60.0  # for a training to save on SIGTERM or SIGUSR1; after it, it is killed
    omp_num_threads: int | None = None  # per rank; null: cores divided by ranks on CPU
    join_timeout_s: float = 600.0  # slurm, external: for all ranks to come together
    silence_timeout_s: float = 60.0  # external: a host that says nothing for as long is gone
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class BenchmarksConfig:
    """Tasks of lm-eval (lm-evaluation-harness), run by vLLM in `generation.python`'s environment."""

    # Task or group -> {num_fewshot: examples before each question, metric: a name in lm-eval's results};
    # what is not given is as the task has it
    tasks: dict[str, Any] = field(default_factory=dict)
    include_path: str | None = None  # directory with task files of your own
    limit: int | None = None  # the first questions of each task; null: all
    max_length: int | None = None  # tokens of a question with its examples; null: the model's own
    timeout_s: float = 86400.0  # for all tasks of one model; loading it included


@dataclass
class EvaluationConfig:
    """What is measured on held-out prompts after each iteration (and on theta_0)."""

    enabled: bool = True
    scorer: str | None = None  # `package.module:function` or `path/to/file.py:function`
    num_prompts: int | None = None  # null: all held-out prompts
    # Score sampled answers. All models are sampled as in iteration 0 (generation.*): scores are compared
    sampled: bool = True
    greedy: bool = True  # and at temperature 0
    benchmarks: BenchmarksConfig = field(default_factory=BenchmarksConfig)


@dataclass
class Config:
    """The whole configuration, one field per top-level key."""

    name: str = "spin"
    run_dir: str = MISSING
    seed: int = 1234
    model: ModelConfig = field(default_factory=ModelConfig)
    spin: SpinConfig = field(default_factory=SpinConfig)
    selfplay: SelfplayConfig = field(default_factory=SelfplayConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    data: DataConfig = field(default_factory=DataConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
