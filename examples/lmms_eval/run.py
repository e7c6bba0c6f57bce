"""lmms-eval's command line with `--model vllm_dvlm`, the model that asks our server.

    python examples/lmms_eval/run.py --tasks mmmu_val --model_args base_url=http://127.0.0.1:8000/v1

All other arguments are lmms-eval's own (`--limit`, `--log_samples`, `--output_path`, ...).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from lmms_eval.__main__ import cli_evaluate  # noqa: E402
from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.models import MODEL_REGISTRY_V2  # noqa: E402
from lmms_eval.models.registry_v2 import ModelManifest  # noqa: E402
from served import ServedDiffusion  # noqa: E402


class ServedDiffusionModel(ServedDiffusion, lmms):
    """`ServedDiffusion` as lmms-eval wants it: a subclass of its own base class."""


def main() -> None:
    """Register the model, then run lmms-eval."""
    # lmms-eval imports models by name; this file may be `__main__`.
    sys.modules["run"] = sys.modules[__name__]
    path = f"run.{ServedDiffusionModel.__name__}"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("vllm_dvlm", simple_class_path=path), overwrite=True)
    if "--model" not in sys.argv:
        sys.argv += ["--model", "vllm_dvlm"]
    if "--batch_size" not in sys.argv:
        sys.argv += ["--batch_size", "1"]
    cli_evaluate()


if __name__ == "__main__":
    main()
