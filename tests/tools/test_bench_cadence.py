"""Two processes count the traffic that the formula gives; the forgetting benchmark adds up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import bench_forgetting
from tools.bench_cadence import RANKS, count_traffic, expected_traffic, one_process_bytes
from tools.processes import run


@pytest.mark.slow
def test_counted_bytes_are_the_formulas() -> None:
    traffic = run(RANKS, count_traffic)[0]
    assert len(traffic) == 4
    for (reduce, part), (counted, _) in traffic.items():
        assert counted == expected_traffic(reduce, part), (reduce, part)  # type: ignore[arg-type]
    assert traffic["every_step", "cms"][1] == 2.0  # bytes a slow parameter: half of four
    assert traffic["at_update", "cms"][1] == one_process_bytes() == 4.0


def test_forgetting_is_what_the_matrix_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variant, forgotten in (("cms", 0.2), ("one_level", 0.5)):
        for seed in range(bench_forgetting.SEEDS):
            folder = bench_forgetting.run_dir(variant, seed)
            folder.mkdir(parents=True)
            rows = [
                {"kind": "step", "tokens": 1, "loss": 9.0},
                *(
                    {
                        "kind": "domain_evaluation",
                        "tokens": 2,
                        "domain": domain,
                        "domains_trained": trained,
                        "loss": loss + 0.01 * seed,
                    }
                    for trained, domain, loss in (
                        (["english"], "english", 3.0),
                        (["english"], "code", 4.5),
                        (["english", "code"], "english", 3.0 + forgotten),
                        (["english", "code"], "code", 2.0),
                    )
                ),
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = bench_forgetting.report()
    figures = json.loads(Path("runs/bench/forgetting.json").read_text())["figures"]
    assert figures["forgetting_nats_cms"] == pytest.approx(0.2)
    assert figures["forgetting_nats_one_level"] == pytest.approx(0.5)
    assert figures["forgetting_ratio"] == pytest.approx(0.4)
    assert figures["code_after_code_cms"] == pytest.approx(2.01)
    assert "0.400" in text
    assert Path("docs/forgetting.png").stat().st_size > 0
