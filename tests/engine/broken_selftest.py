"""Runs a self-test's engine checks on an installation that is broken on purpose; started by test_selftest.py.

python -m tests.engine.broken_selftest BREAK... JOB
"""

import sys


def causal():
    """The attention backend ignores that every row sees every key."""
    from vllm.v1.worker.gpu import attn_utils

    from vllm_dvlm.models import whole_attention

    build = attn_utils.build_attn_metadata
    attn_utils.build_attn_metadata = lambda *args, **kwargs: build(*args, **kwargs | {"causal": True})
    whole_attention.choose = lambda *args: None


def layout():
    """Two rows of a KV page lie the other way round than thought."""
    import torch

    from vllm_dvlm.kv.layout import PageLayout
    from vllm_dvlm.worker import pruning

    probe = pruning.probe_cpu_layout

    def wrong(*args):
        found = probe(*args)
        order = torch.arange(len(found.key))
        order[[3, 4]] = order[[4, 3]]
        return PageLayout(found.key[order], found.value)

    pruning.probe_cpu_layout = wrong


def factor():
    """The scoring kernel scales by another number."""
    from vllm_dvlm.models import probe

    score = probe.attention_to_columns
    probe.attention_to_columns = lambda q, k, scale, *rest: score(q, k, 1.01 * scale, *rest)


def release():
    """Pruned requests keep their blocks."""
    from vllm_dvlm import scheduler

    scheduler.release_tail = lambda *args, **kwargs: 0


def main():
    from vllm_dvlm.tools.selftest import engine_checks

    *breaks, job = sys.argv[1:]
    for name in breaks:
        globals()[name]()
    engine_checks.main(job)


if __name__ == "__main__":
    main()
