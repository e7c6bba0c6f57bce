"""`vllm-dvlm serve`: engines with processes of their own, one of which is killed; ranks that are actors of Ray."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.ray.conftest import free_port
from tests.ray.served import CHAT, ROOT, Load, Served, check, picture_questions, processes, serving, text_of, wait_until

RAY_EXAMPLES = ROOT / "examples" / "ray"
TINY = ["--served-model-name", "demo", "--dtype", "float32", "--kv-cache-memory-bytes", str(2**27)]
STOP_S = 180  # `serve run` waits for the replicas, each of which may finish what it has begun
TEXT = {"model": "demo", "prompt": "the 7", "max_tokens": 16, "temperature": 0}


def test_a_killed_engine_takes_its_replica_along(cluster, tmp_path):
    pytest.importorskip("sklearn")
    questions = picture_questions(16)
    with serving(tmp_path, "--replicas", "2", VLLM_ENABLE_V1_MULTIPROCESSING="1") as served:
        answers = [text_of(served.ask(CHAT, body)[2], False) for body in questions]
        load = Load(served, questions, share_of_streams=0.5)
        load.wait(64)
        os.kill(processes("VLLM::EngineCore")[0], signal.SIGKILL)
        load.wait(200)
        done = load.stop()
        check(done, answers, num_lost=8)
        assert max(seconds for *_, seconds in done) < 10
        served.wait(2)


def test_ranks_in_a_placement_group_say_what_one_rank_says(cluster, checkpoint, tmp_path):
    found = []
    for options in ([], ["-tp", "2", "--distributed-executor-backend", "ray"]):
        with serving(tmp_path, *options, model=checkpoint(seed=0), engine=TINY) as served:
            assert bool(processes("ray::RayWorkerProc")) == bool(options)
            status, _, text = served.ask("/v1/completions", TEXT)
            assert status == 200, text
            found.append(json.loads(text)["choices"][0]["text"])
    assert found[0] == found[1] and len(set(found[0].split())) > 1


def test_a_killed_rank_takes_its_replica_along(cluster, checkpoint, tmp_path):
    """A rank that is an actor of Ray: requests that were with its engine are repeated on the new one."""
    chat = {"model": "demo", "messages": [{"role": "user", "content": "the 7"}], "max_tokens": 16, "temperature": 0}
    options = ["-tp", "2", "--distributed-executor-backend", "ray"]
    with serving(tmp_path, *options, model=checkpoint(seed=0), engine=TINY) as served:
        answer = text_of(served.ask(CHAT, chat)[2], False)
        load = Load(served, [chat], num_at_once=4, share_of_streams=0.5)
        load.wait(8)
        ranks = processes("ray::RayWorkerProc")
        os.kill(ranks[0], signal.SIGKILL)
        wait_until(lambda: not set(ranks) & set(processes("ray::RayWorkerProc")))
        load.wait(16)
        check(load.stop(), [answer], num_lost=2)
        served.wait(1)


def test_a_config_file_names_the_same_application(cluster, tmp_path):
    pytest.importorskip("sklearn")
    port, log = free_port(), tmp_path / "serve.log"
    config = yaml.safe_load((RAY_EXAMPLES / "serve.yaml").read_text())
    config["http_options"]["port"] = port  # another server may have the usual one
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    with log.open("wb") as file:
        command = [str(Path(sys.executable).with_name("serve")), "run", str(tmp_path / "serve.yaml")]
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
    served = Served(f"http://127.0.0.1:{port}", process, log)
    try:
        served.wait_until_up()
        status, headers, text = served.ask(CHAT, picture_questions(1)[0])
        assert status == 200 and headers["x-vllm-dvlm"] and text_of(text, False)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_S)


def test_the_kubernetes_manifest_names_the_same_application():
    from ray.serve.schema import ServeDeploySchema

    from vllm_dvlm.cluster import serving as module
    from vllm_dvlm.cluster.launch import ENVIRONMENT

    manifest = yaml.safe_load((RAY_EXAMPLES / "rayservice.yaml").read_text())
    (found,) = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"])).applications
    assert found.import_path == f"{module.__name__}:app"
    module.app(found.args)  # every argument is known
    (head,) = manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {each["name"]: each["value"] for each in head["env"]} == ENVIRONMENT
