"""The benchmark runs and its ratios are sane; how fast it is depends on the machine and is not tested."""

import re

import bench


def test_the_benchmark_prints_both_tables(capsys):
    bench.main(["--width", "32", "--layers", "1", "--rows", "2", "--text", "120", "--repeats", "1"])
    out = capsys.readouterr().out
    assert out.startswith("python bench.py --width 32") and "torch" in out
    labels = re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", out, re.MULTILINE)
    assert labels == ["2", "15", "44"]
    waste = [float(share) for share in re.findall(r"\| ([\d.]+)% \|", out)]
    assert len(waste) == 6 and waste[0] > waste[1] > 20, "sorting the rows of one step helps, but not enough"
    assert waste[0] > 50 and max(waste[2:]) <= 5, "a token budget keeps padding at 5 % or less"
