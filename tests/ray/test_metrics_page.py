"""Pages of several replicas as one."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_dvlm.cluster.metrics_page import merge


def page(value):
    registry = CollectorRegistry()
    Counter("vllm:requests", "Requests.", ["engine"], registry=registry).labels(engine="0").inc(value)
    Histogram("vllm:seconds", "Seconds.", buckets=(1, 2), registry=registry).observe(value)
    return generate_latest(registry).decode()


def test_every_sample_says_whose_it_is():
    joint = merge({"a": page(1), "b": page(2)}).decode()
    assert joint.count("# TYPE vllm:requests_total counter") == joint.count("# TYPE vllm:seconds histogram") == 1
    found = {
        (sample.name, sample.labels["replica"], sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(joint)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert found["vllm:requests_total", "a", None] == 1 and found["vllm:requests_total", "b", None] == 2
    assert found["vllm:seconds_bucket", "a", "1.0"] == 1 and found["vllm:seconds_bucket", "b", "1.0"] == 0
    assert len(found) == 2 * (1 + 3 + 2)
