"""A LaViDa checkpoint in its vLLM model class, without an engine; as a process, one of several ranks.

    python -m tests.engine.lavida_model CHECKPOINT STORE RANK RANKS OUT CASE...

OUT becomes the logits of each case's canvas, [canvas, vocabulary], by name: torch.load.
"""

import sys
from contextlib import contextmanager

import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.multimodal.utils import group_and_batch_mm_kwargs
from vllm.renderers.registry import renderer_from_config

from tests.golden import lavida_cases as cases
from vllm_dvlm.models.forward_plan import ForwardPlan


@contextmanager
def process_group(store, rank=0, num_ranks=1, **engine_args):
    """vLLM's process groups of `num_ranks` ranks, which meet at the file `store`."""
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    config = EngineArgs(tensor_parallel_size=num_ranks, **engine_args).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(num_ranks, rank, f"file://{store}", rank, backend="gloo")
        initialize_model_parallel(num_ranks, 1)
    yield
    cleanup_dist_env_and_memory()


class LoadedModel:
    """A model as vLLM loads it, which is an error if a weight is missing or has no place, and its front end."""

    def __init__(self, folder, num_ranks=1, **overrides):
        args = EngineArgs(model=str(folder), tensor_parallel_size=num_ranks, hf_overrides=overrides)
        self.config = args.create_engine_config()
        loader, model_config = get_model_loader(self.config.load_config), self.config.model_config
        # Not `get_model`: it empties the cache of an accelerator, which vLLM's CPU workers take out.
        with set_current_vllm_config(self.config):
            self.model = loader.create_model(self.config, model_config).eval()
            loader.load_weights(self.model, model_config)
            process_weights_after_loading(self.model, model_config, torch.device("cpu"))
        self.plan = ForwardPlan()
        self.model.model.set_forward_plan(self.plan)

    @torch.inference_mode()
    def merge(self, case):
        """Embeddings of the prompt of a case, [T, hidden], and [first, end) of its image, if it has one."""
        front_end = renderer_from_config(self.config)
        images = {} if case.image_record is None else {"multi_modal_data": {"image": cases.image(case)}}
        prompt = front_end.render_cmpl([{"prompt": case.prompt_text, **images}])[0]
        front_end.shutdown()
        embeddings = self.model.embed_input_ids(torch.tensor(prompt["prompt_token_ids"]))
        if not images:
            return embeddings, None
        (place,) = prompt["mm_placeholders"]["image"]
        ((_, _, batch),) = group_and_batch_mm_kwargs([("image", item) for item in prompt["mm_kwargs"]["image"]])
        (embeddings[place.offset : place.offset + place.length],) = self.model.embed_multimodal(**batch)
        return embeddings, (place.offset, place.offset + place.length)

    @torch.inference_mode()
    def hidden(self, embeddings):
        """[T, hidden] -> final hidden states of one pass in which every row attends to every row."""
        self.plan.keeps_kv, self.plan.whole_spans = False, [(0, len(embeddings), 0)]
        with set_current_vllm_config(self.config):
            return self.model(None, torch.arange(len(embeddings)), inputs_embeds=embeddings)

    @torch.inference_mode()
    def with_canvas(self, case):
        """Prompt and initial canvas, [T, hidden]."""
        canvas = torch.tensor(case.raw.get("initial_canvas") or [case.kind.mask] * case.settings["max_new_tokens"])
        return torch.cat([self.merge(case)[0], self.model.embed_input_ids(canvas)])


def main(folder, store, rank, num_ranks, out, *names):
    with process_group(store, int(rank), int(num_ranks), model=folder):
        loaded, logits = LoadedModel(folder, int(num_ranks)), {}
        for case in map(cases.load, names):
            hidden = loaded.hidden(loaded.with_canvas(case))
            logits[case.name] = loaded.model.vocab_logits(hidden[case.prompt_len :])
        torch.save(logits, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
