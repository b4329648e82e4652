from mllm.provenance import provenance


def test_a_figure_names_date_commit_device_and_versions():
    stamp = provenance()
    assert set(stamp) >= {"date", "commit", "device", "torch", "deepspeed"}
    assert all(stamp.values())
