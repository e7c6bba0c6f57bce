#!/usr/bin/env bash
# Serve a checkpoint whose requests prune unless they say otherwise: cached steps, and RedVTP keeps a quarter.
#
#     bash examples/serve.sh [MODEL] [options of vllm serve]
#
# A request overrides each of these options in its "vllm_xargs", for example {"prune_method": "none"}.
set -euo pipefail
model=${1:-"$(dirname "${BASH_SOURCE[0]}")/demo_model"}
shift || true
exec vllm serve "$model" \
    --additional-config '{"dvlm": {"diffusion_refresh_interval": 32, "prune_method": "redvtp", "prune_keep_ratio": 0.25}}' \
    "$@"
