"""The demo on fewer tokens: its packaged model, its tables, and GPTQ ahead of RTN on modules the model never saw."""

import io

from rich.console import Console

from jgptq import demo


def test_the_demo_shows_gptq_ahead_of_rtn(monkeypatch):
    monkeypatch.setattr(demo, "BITS", (4,))
    monkeypatch.setattr(demo, "EVALUATED_TOKENS", 4000)
    monkeypatch.setattr(demo, "SAMPLES", 32)
    announced = []
    results, completions = demo.run(announced.append)
    by_name = {result.name: result for result in results}
    assert list(by_name) == ["float", "RTN 4-bit", "GPTQ 4-bit"]
    assert 5 < by_name["float"].perplexity < 12  # it learned: its vocabulary has 1024 tokens
    rtn, gptq = by_name["RTN 4-bit"], by_name["GPTQ 4-bit"]
    assert 0 < gptq.kl < 0.75 * rtn.kl  # 0.53 on the demo's own tokens
    assert gptq.nbytes == rtn.nbytes < 0.5 * by_name["float"].nbytes
    assert set(completions) == {"float", "GPTQ 4-bit"}
    assert len(announced) == 4

    shown = io.StringIO()
    Console(file=shown, width=100).print(demo.table(results))
    assert all(name in shown.getvalue() for name in by_name)
