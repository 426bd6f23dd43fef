"""``python -m attn_mask doctor`` and what else the command line takes."""

import json
import os
import subprocess
import sys

import attn_mask
import pytest
import torch
from attn_mask.__main__ import main
from attn_mask._transformers import doctor

WITHOUT = "import sys\nfor name in {names}: sys.modules[name] = None\n"
MAIN = "import sys\nfrom attn_mask.__main__ import main\nsys.exit(main({arguments}))\n"


def run(*arguments, without=(), before=""):
    """In a new process, where some modules can't be imported."""
    code = WITHOUT.format(names=without) + before + MAIN.format(arguments=list(arguments))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_doctor_is_well():
    done = subprocess.run(
        [sys.executable, "-m", "attn_mask", "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"attn_mask {attn_mask.__version__}, torch {torch.__version__}" in done.stdout
    assert "FAULT" not in done.stdout
    if not torch.cuda.is_available():
        assert "note       torch sees no GPU" in done.stdout


@pytest.mark.parametrize("without", [(), ("typer", "rich"), ("transformers",)])
def test_json(without):
    # What others print goes elsewhere.
    before = (
        "import attn_mask._transformers.doctor as d\nmake = d.diagnose\n"
        "def diagnose():\n    print('noise')\n    return make()\n"
        "d.diagnose = diagnose\n"
    )
    done = run("doctor", "--json", without=without, before=before)
    assert done.returncode == 0, done.stderr
    assert "noise" in done.stderr
    told = json.loads(done.stdout)
    assert list(told) == ["ok", "versions", "build", "cuda", "install", "selftest", "findings"]
    assert told["ok"] is True and told["findings"] == []
    assert told["build"] == attn_mask.build_info()
    assert told["versions"]["torch"] == torch.__version__
    assert told["selftest"]["ok"] and told["selftest"]["seconds"] < 2
    is_there = "transformers" not in without
    assert (told["install"]["transformers"] is not None) == is_there
    assert bool(told["install"]["replaced"]) == is_there
    assert bool(told["install"]["notes"]) == (not is_there)
    assert told["install"]["installed"] is False


def finding(capsys):
    """The only one, of a doctor who exits with 1."""
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    (only,) = told["findings"]
    assert set(only) == {"what", "mend"}
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert f"FAULT      {only['what']}\n           to mend it: {only['mend']}" in text
    return only


def test_wrong_masks_are_a_fault(monkeypatch, capsys):
    right = doctor.dense.boolean
    monkeypatch.setattr(doctor.dense, "boolean", lambda *args, **kw: ~right(*args, **kw))
    only = finding(capsys)
    assert only["what"].startswith("the self-test fails: causal on cpu, window on cpu, chunks")
    assert "pip install" in only["mend"]


def test_kernels_that_raise_are_a_fault(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setattr(doctor.dense, "additive", broken)
    only = finding(capsys)
    assert only["what"] == "the self-test fails: runs on cpu (RuntimeError: no kernel)"


def test_a_transformers_that_is_too_old_is_a_fault(monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers, "__version__", "4.30.0")
    only = finding(capsys)
    assert only["what"] == (
        "attn_mask.install() would raise ImportError: attn_mask.install: expected transformers "
        "4.35.0 or later, but 4.30.0 is installed"
    )
    assert "pip install transformers==" in only["mend"]


def test_a_gpu_without_kernels_is_a_fault(monkeypatch, capsys):
    build = {**attn_mask.build_info(), "cuda_version": "13.0", "cuda_archs": ["9.0"]}
    monkeypatch.setattr(doctor.library, "build_info", lambda: build)
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", (8, 6)),
        ("get_device_name", "A card"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(doctor, "usable_devices", lambda cuda: ["cpu"])
    only = finding(capsys)
    assert only["what"] == "no CUDA kernels for A card (8.6), only for 9.0"
    assert "TORCH_CUDA_ARCH_LIST=8.6 " in only["mend"]


@pytest.mark.parametrize(
    ("archs", "capability", "fits"),
    [
        (["8.0", "9.0", "10.0+PTX"], (8, 0), True),
        (["8.0", "9.0", "10.0+PTX"], (8, 9), True),
        (["8.0", "9.0", "10.0+PTX"], (7, 5), False),
        (["8.0", "9.0", "10.0+PTX"], (12, 0), True),
        (["8.0", "9.0"], (10, 0), False),
        (["8.6"], (8, 0), False),
        (["9.0a"], (9, 0), True),
        (["10.0a+PTX"], (12, 0), False),
        (["10.0f"], (10, 3), True),
    ],
)
def test_which_gpus_kernels_fit(archs, capability, fits):
    assert doctor.fits(capability, archs) is fits


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["doctor", "--bad"], "--bad"), (["doctor", "x"], "x"), (["nope"], ""), ([], "")],
)
def test_a_bad_option_is_one_line(arguments, named):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m attn_mask: ") and named in line


SHOWN = (
    ("--causal --q 4", attn_mask.causal(), 4, 4),
    ("--causal --q 4 --kv 6", attn_mask.causal(), 4, 6),
    ("--q 3", attn_mask.bidirectional(), 3, 3),
    (
        "--causal --window 4 --q 12 --kv 12 --left-padding 3 --documents 5,7",
        attn_mask.causal()
        & attn_mask.sliding_window(4)
        & attn_mask.padding(torch.tensor([0] * 3 + [1] * 9))
        & attn_mask.documents(torch.tensor([0] * 5 + [1] * 7)),
        12,
        12,
    ),
)


@pytest.mark.parametrize(("arguments", "rule", "q_length", "kv_length"), SHOWN)
def test_show(arguments, rule, q_length, kv_length, capsys):
    assert main(["show", *arguments.split()]) == 0
    assert capsys.readouterr().out == f"{attn_mask.show(rule, q_length, kv_length)}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--causal", "arguments are required: --q"),
        ("--q x", "argument --q: expected an int of at least 1, but got x"),
        ("--q 0", "argument --q: expected an int of at least 1, but got 0"),
        ("--q 4 --windw 3", "unrecognized arguments: --windw"),
        ("--q 4 --window 0", "argument --window: expected"),
        ("--q 4 --left-padding 5", "show: expected --left-padding up to 4, but got 5"),
        (
            "--q 4 --documents 2,3",
            "show: expected --documents to be lengths that add up to 4, such as 5,7, but got 2,3",
        ),
        ("--q 4 --documents 5,-1", "but got 5,-1"),
        ("--q 4 --documents a,b", "but got a,b"),
        ("--q 4 --kv 5 --documents 2,2", "show: expected as many keys as queries"),
    ],
)
def test_what_show_refuses_is_one_line(arguments, says, capsys):
    assert main(["show", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("python -m attn_mask: ") and says in line


def test_nothing_else_is_needed():
    """Neither typer nor rich, which an extra had."""
    done = run("show", "--causal", "--q", "4", without=("typer", "rich"))
    assert (done.returncode, done.stdout) == (0, f"{attn_mask.show(attn_mask.causal(), 4)}\n")


def test_help(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("doctor", "show", "bench"))


@pytest.mark.parametrize("without", [("rich",), ("rich", "transformers")])
def test_bench(without):
    is_alone = "transformers" in without
    done = run("bench", "--quick", without=without)
    assert done.returncode == 0, done.stderr
    assert "bench" in done.stderr and "100%" in done.stderr
    assert ("without transformers" in " ".join(done.stdout.split())) == is_alone
    title, heads, *rows = done.stdout.splitlines()
    assert title.startswith(f"attn_mask {attn_mask.__version__} and ") and heads.startswith("mask")
    assert len(rows) == 5
    for row in rows:
        *name, ours, theirs, ratio = row.split()
        assert name and float(ours) > 0
        assert (theirs, ratio) == ("-", "-") if is_alone else float(theirs) > 0 and float(ratio) > 0


def test_bench_times_no_masks_that_differ(monkeypatch, capsys):
    pytest.importorskip("transformers")
    from attn_mask._tools import bench

    def timed(*args):
        raise AssertionError

    monkeypatch.setattr(bench, "_milliseconds", timed)
    monkeypatch.setattr(bench.torch, "equal", lambda *masks: False)
    assert main(["bench", "--quick"]) == 1
    assert "a step of decoding" in capsys.readouterr().out.split("not as in transformers")[1]


@pytest.mark.parametrize("arguments", [["--slow"], ["9"]])
def test_what_bench_refuses_is_one_line(arguments, capsys):
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("python -m attn_mask: ") and arguments[0] in line
