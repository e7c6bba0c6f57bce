"""vLLM's front end without an engine behind it, and requests that it refuses."""

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.registry import renderer_from_config
from vllm.v1.engine import input_processor

MAX_MODEL_LEN = 2048
MAX_CANVAS = 64
SERVER = {"max_canvas_length": MAX_CANVAS, "max_image_tiles": 5}


def engine_config(checkpoint, **changes):
    values = {"max_model_len": MAX_MODEL_LEN, "additional_config": {"dvlm": SERVER}} | changes
    return EngineArgs(model=str(checkpoint(seed=0)), **values).create_engine_config()


class FrontEnd:
    """A request's way from the user to the engine, which it does not enter."""

    def __init__(self, config):
        self.renderer = renderer_from_config(config)
        self.processor = input_processor.InputProcessor(config, self.renderer)

    def send(self, prompt=None, **params):
        params = {"max_tokens": 16, "temperature": 0} | params
        (engine_input,) = self.renderer.render_cmpl([prompt or {"prompt": "Hello there"}])
        return self.processor.process_inputs("r", engine_input, SamplingParams(**params), ("generate",))


def refused(front_end, match, prompt=None, **params):
    with pytest.raises(ValueError, match=match) as caught:
        front_end.send(prompt, **params)
    assert isinstance(caught.value, VLLMValidationError), "HTTP 400"
    assert len(str(caught.value)) < 1500, "does not repeat what it was sent"
    return caught.value
