"""A stand-in for vLLM, for what the real one cannot be made to do: hang, lie, or end when asked.

It starts in a moment, and is put where `import vllm` finds it. What it answers depends on
the first byte of `model.safetensors`' data alone
(and, if so ordered, on the seed of the request); a file `orders.json` in the directory that
`ORDERS` names tells it how to misbehave. The worker, its protocol and everything on the
parent's side are the real ones.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from nemo_spin.data.files import write_json

_PACKAGE = {
    "__init__.py": """
        import dataclasses, json, os, time
        from pathlib import Path

        ORDERS = {}

        class Completion:
            def __init__(self, tokens, logp):
                self.token_ids, self.finish_reason = tokens, "stop"
                self.logprobs = [{token: Logprob(logp)} for token in tokens]

        @dataclasses.dataclass
        class Logprob:
            logprob: float

        class Output:
            finished = True

            def __init__(self, prompt, params, model):
                seed = params.values.get("seed") if ORDERS.get("seeded") else None
                self.outputs = [Completion([3] if seed is None else [40 + seed % 200, 3], model)]
                self.prompt_logprobs = [None, *({t: Logprob(model)} for t in prompt[1:])]

        class SamplingParams:
            def __init__(self, **values):
                self.values = values

        def weights_of(directory):
            return -1.0 - (Path(directory) / "model.safetensors").read_bytes()[-1] / 256

        class LLM:
            def __init__(self, model, **settings):
                self.model = weights_of(model)
                self.obey("load")

            def obey(self, moment):
                ORDERS.clear()
                ORDERS.update(json.loads(Path(os.environ["ORDERS"], "orders.json").read_text()))
                time.sleep(ORDERS.get("seconds", 0.0))
                match ORDERS.get(moment):
                    case "hang":
                        time.sleep(600)
                    case "fail":
                        raise RuntimeError(f"{moment} is out of order")
                    case "die":
                        os._exit(9)
                    case "nothing":
                        return False
                return True

            def reset_prefix_cache(self):
                return True

            def collective_rpc(self, method, kwargs):
                assert method == "reload_weights"
                if self.obey("reload"):
                    self.model = weights_of(kwargs["weights_path"])

            def generate(self, prompts, params, use_tqdm, lora_request):
                if isinstance(params, list):
                    self.obey("generate")
                else:
                    params = [params] * len(prompts)
                return [Output(p["prompt_token_ids"], q, self.model) for p, q in zip(prompts, params)]
        """,
    "platforms.py": """
        class current_platform:
            device_type = "cpu"

            @staticmethod
            def is_cpu():
                return True
        """,
    "v1/worker/gpu_model_runner.py": """
        class GPUModelRunner:
            def reload_weights(self, weights_iterator=None, weights_path=None):
                pass
        """,
}


def write_package(directory: Path) -> Path:
    """Writes the package; `directory` goes into PYTHONPATH."""
    for name, source in _PACKAGE.items():
        path = directory / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source), encoding="utf-8")
    return directory


def order(directory: Path, **orders: Any) -> None:
    """How the stand-in behaves from now on.

    `load`, `reload`, `generate` = hang | fail | die | nothing; `seconds` that each of them takes;
    `seeded` answers that differ.
    """
    write_json(directory / "orders.json", orders)
