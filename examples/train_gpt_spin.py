"""Self-play the way NeMo's own examples are started: through `hydra_runner`.

    python examples/train_gpt_spin.py run_dir=runs/mine model.path=/models/sft data.train=train.jsonl
    python examples/train_gpt_spin.py --config-path /my/conf --config-name mine spin.beta=0.5

It does what `nemo-spin run` does, and either goes on with what the other has begun. Keys that
are not written in the YAML file need Hydra's `+` (`+model.packing=pairs`); everything is
checked as `nemo-spin validate-config` checks it.
"""

from __future__ import annotations

import sys

from nemo.core.config import hydra_runner
from omegaconf import DictConfig, OmegaConf

from nemo_spin.config.load import from_mapping
from nemo_spin.config.validate import validate
from nemo_spin.errors import NemoSpinError
from nemo_spin.launch.choice import launching
from nemo_spin.selfplay import loop
from nemo_spin.selfplay.screen import Screen


@hydra_runner(config_path="../conf", config_name="spin")
def main(cfg: DictConfig) -> None:
    """Runs all stages of all iterations, going on where an earlier start stopped."""
    try:
        config = from_mapping(OmegaConf.to_container(cfg, resolve=True))
        validate(config, command="run")
        with launching(config, config.run_dir) as launcher:
            if launcher is not None:
                loop.run(config, launcher=launcher, screen=Screen())
    except NemoSpinError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
