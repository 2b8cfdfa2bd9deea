"""File names of evaluation records."""

from vca.evaluation.record import record_name


def name_of(made):
    sides = {"samples": {"sha256": "a", "made": made}, "reference": {"sha256": "b"}}
    return record_name({"count": 8, "settings": {}, "extractor": {"name": "file"}, **sides})


def test_record_name_depends_on_weights():
    """Weights whose 8-bit samples are equal have records with different names."""
    made = [{"protocol": None, "origin": {"weights_sha256": sha256}} for sha256 in "cd"]
    assert len({name_of(one) for one in (*made, {"protocol": None}, None)}) == 3
    assert name_of(made[0]) == name_of(dict(made[0]))
