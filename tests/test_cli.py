"""The command line: what it answers, where it writes, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kindling as kd
from kindling import cli, console, options

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ("featurize", "fit", "preflight", "evaluate", "predict", "summary", "transfer", "demo")

NETS = """
import time

import kindling as kd
from torch import nn


def photo():
    return kd.prepare.ImageStep("photo", size=(8, 8), resize="squash", channels="L", scale=1 / 255)


def small(labels=("0", "1", "2")):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, len(labels)))
    return kd.Model.of(net, inputs=photo(), labels=labels)


def needs(labels):
    return small(labels)


def wrong():
    return nn.Linear(1, 1)


def sleepy():
    print("ready", flush=True)
    time.sleep(60)


def broken():
    raise ZeroDivisionError("a bug of the user's")
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of nets of the user's own."""
    (tmp_path / "my_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return tmp_path


def run(*words: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output + result.stderr
    return result


def answer(*words: str | Path) -> dict[str, Any]:
    """What a command writes to stdout with --json: one object and nothing else."""
    out = run(*words, "--json").stdout
    assert out.count("\n") == 1, out
    data: dict[str, Any] = json.loads(out)
    return data


def program(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kindling", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        **options,
    )


# Without Spark


def test_version_and_help() -> None:
    assert run("--version").stdout == f"kindling {kd.__version__}\n"
    page = run("--help").stdout
    assert all(command in page for command in COMMANDS)
    assert "Exit codes" in page
    assert run("-h").stdout == page


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"kindling {command}" in run(command, "--help").stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "No such command"),
        (["summary"], "Missing argument"),
        (["summary", "lenet", "--nonsense"], "No such option"),
        (["fit", "photos", "--out", "model"], "--model and --out are needed"),
        (["fit", "photos", "--solver", "gone.prototxt", "--out", "model"], "there is no file gone.prototxt"),
        (["fit", "photos", "--model", "lenet", "--mean", "m", "--out", "model"], "for the net of a --solver"),
        (["fit", "photos", "--model", "lenet", "--resize-to", "9", "--out", "model"], "for the net of a --solver"),
        (["fit", "photos", "--model", "lenet", "--out", "model", "--epochs", "0"], "--epochs"),
        (["fit", "photos", "--model", "lenet", "--out", "model", "--strategy", "magic"], "averaging:N"),
        (["fit", "photos", "--model", "lenet", "--out", "model", "--strategy", "diloco:5,speed=3"], "outer_lr"),
        (["fit", "photos", "--model", "lenet", "--out", "model", "--strategy", "threshold:tiny"], "wrong kind"),
        (["transfer", "photos", "--net", "lenet", "--out", "model", "--split", ".7,.7"], "three shares"),
        (["transfer", "photos", "--net", "lenet", "--out", "model", "--split", ".9,.1,0"], "three shares"),
        (["transfer", "photos", "--net", "lenet", "--out", "model", "--split", ".7,.15,.1501"], "three shares"),
        (["evaluate", "photos", "--model", "lenet", "--master", "local", "--remote", "local"], "not both"),
    ],
)
def test_a_wrong_command_line_ends_with_2(words: list[str], said: str) -> None:
    result = run(*words, code=2)
    assert said in result.stderr
    assert result.stdout == ""


def test_an_error_ends_with_1_in_one_screen_without_traceback() -> None:
    result = run("summary", "lennet", code=1)
    assert result.stdout == ""
    assert "lennet" in result.stderr
    assert "Did you mean 'lenet'" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= console.SCREEN


def test_an_error_as_json() -> None:
    result = run("summary", "lennet", "--json", code=1)
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "FormatError"
    assert "lennet" in error["message"]


def test_interrupted_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kd, "load", load, raising=False)
    assert "Interrupted" in run("summary", "lenet", code=130).stderr


def test_a_bug_is_not_dressed_up(nets: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug of the user's"):
        run("summary", "my_nets:broken")


def hear_interrupts() -> None:
    """Programs that a shell starts in the background ignore them, and so do all that these start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_the_program_with_130(nets: Path) -> None:
    command = [sys.executable, "-m", "kindling", "summary", "my_nets:sleepy"]
    pipes: Any = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": nets}
    with subprocess.Popen(command, **pipes, preexec_fn=hear_interrupts) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"  # a stray print goes to stderr
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_during_a_spark_job(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kindling", "demo", "--out", "demo"]
    pipes: Any = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen(command, **pipes, preexec_fn=hear_interrupts) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "LeNet learns" in line:
                break
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Interrupted." in err
    assert "Traceback" not in err


def test_programs_end_with_their_codes(tmp_path: Path) -> None:
    assert program("summary", "lennet", cwd=tmp_path).returncode == 1
    assert program("summary", cwd=tmp_path).returncode == 2
    assert program("summary", "lenet", cwd=tmp_path).returncode == 0


def test_java_s_stack_trace_is_cut_off() -> None:
    from pyspark.errors import PySparkException

    message = "[PATH_NOT_FOUND] Path does not exist: /x. SQLSTATE: 42K03"
    trace = "\n\tat org.apache.spark.A.b(A.scala:1)\n\tat java.C.d(C.java:2)"
    assert console.explain(PySparkException(message + trace)) == message
    assert console.explain(kd.errors.DataError("\n".join(map(str, range(99))))).count("\n") == console.SCREEN  # type: ignore[union-attr]
    assert console.explain(KeyError("x")) is None


def test_summary() -> None:
    page = run("summary", "lenet").stdout
    assert "conv1" in page
    assert "431,080" in page  # the published number of LeNet's parameters (Caffe, Deeplearning4j)
    data = answer("summary", "lenet")
    assert data["total"] == 431_080


def test_summary_of_a_cut_and_frozen_net(tmp_path: Path) -> None:
    data = answer("summary", "lenet", "--until", "fc1", "--freeze", "pool2", "--plot", tmp_path / "net.svg")
    assert data["total"] == 431_080 - 5_010
    assert data["frozen"] == (25 * 20 + 20) + (20 * 25 * 50 + 50)
    assert "conv2" in (tmp_path / "net.svg").read_text()


def test_a_function_of_the_user_s(nets: Path) -> None:
    assert answer("summary", "my_nets:small")["total"] == 64 * 16 + 16 + 16 * 3 + 3
    assert options.open_model("my_nets:needs", labels=("a", "b")).labels == ("a", "b")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_netz:small", "cannot be imported"),
        ("my_nets:smal", "is not in module"),
        ("my_nets:wrong", "Return kindling.Model.of"),
        ("my_nets:needs", "no labels"),
    ],
)
def test_a_function_that_cannot_be_used(nets: Path, name: str, said: str) -> None:
    assert said in run("summary", name, code=1).stderr


def test_weights_for_a_function_are_refused(nets: Path) -> None:
    assert "shipped nets" in run("summary", "my_nets:small", "--weights", "file", code=2).stderr


def test_predict_files_without_spark(nets: Path, photos: Path) -> None:
    options.open_model("my_nets:small").save("model")
    files = sorted(photos.glob("*/00.png"))
    blocked = (
        "import sys; sys.modules['pyspark'] = None; from kindling.cli import main; sys.argv[0] = 'kindling'; main()"
    )
    command = [sys.executable, "-c", blocked, "predict", *map(str, files), "--model", "model", "--json", "--top-k", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=nets, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["predictions"]
    assert [row["path"] for row in answers] == [str(file) for file in files]
    for row in answers:
        assert len(row["top_k"]) == 2
        assert row["prediction"] == row["top_k"][0]["label"]
        assert 1 / 3 <= row["probability"] <= 1
    page = run("predict", *files, "--model", "model").stdout
    assert len(page.splitlines()) == 3


# With Spark


@pytest.fixture(scope="module")
def job(spark: Any, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path, dict[str, Any]]:
    """`kindling transfer`, run once: its words, its folder, its answer."""
    folder = tmp_path_factory.mktemp("job")
    words = ["transfer", photos, "--net", "lenet", "--until", "fc1", "--out", folder / "model", "--workers", 2]
    words += ["--lr", 0.05, "--epochs", 8, "--batch-size", 4, "--split", ".6,.2,.2", "--features", folder / "f.parquet"]
    words += ["--report", folder / "out" / "report.json", "--plot", folder / "out" / "confusion.png"]
    return words, folder, answer(*words)


@pytest.mark.spark
@pytest.mark.sessions
def test_transfer(job: tuple[list[Any], Path, dict[str, Any]]) -> None:
    _, folder, data = job
    assert sum(data["rows"].values()) == 60
    assert data["labels"] == ["0", "1", "2"]
    assert data["accuracy"]["train"] > 0.9  # three digits told apart by a linear head on random features
    assert data["broken"] == 0
    assert data["precision"] in ("bf16", "fp32")
    assert {"featurise", "train", "evaluate", "save"} <= set(data["seconds"])
    assert json.loads((folder / "out" / "report.json").read_text())["report"] == data["report"]
    assert (folder / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert kd.load(folder / "model").labels == ("0", "1", "2")


@pytest.mark.spark
def test_transfer_again(job: tuple[list[Any], Path, dict[str, Any]], tmp_path: Path) -> None:
    words, folder, first = job
    assert "is there already" in run(*words, code=1).stderr
    written = {path: path.stat().st_mtime_ns for path in folder.glob("f.parquet/**/*.parquet")}
    page = run(*words, "--out", tmp_path / "model").stdout
    for side in ("train", "valid", "test"):
        assert f"{first['accuracy'][side]:.4f}" in page  # the same seed, the same model
    assert written == {path: path.stat().st_mtime_ns for path in folder.glob("f.parquet/**/*.parquet")}


@pytest.mark.spark
def test_evaluate_and_predict(
    spark: Any, job: tuple[list[Any], Path, dict[str, Any]], photos: Path, tmp_path: Path
) -> None:
    _, folder, data = job
    model = folder / "model"
    whole = answer("evaluate", photos, "--model", model)["report"]
    assert whole["rows"] == 60
    expected = sum(data["accuracy"][side] * data["rows"][side] for side in ("train", "valid", "test")) / 60
    assert whole["accuracy"] == pytest.approx(expected, abs=1.5 / 60)  # features in bf16 may turn a close call

    out = tmp_path / "answers.parquet"
    assert answer("predict", photos, "--model", model, "--out", out)["rows"] == 60
    answers = {row.path: row.prediction for row in spark.read.parquet(str(out)).collect()}
    right = sum(path.rsplit("/", 2)[1] == prediction for path, prediction in answers.items())
    assert right / 60 == pytest.approx(whole["accuracy"])

    rows = answer("predict", photos, "--model", model, "--limit", "7", "--top-k", "2")["predictions"]
    assert len(rows) == 7
    for row in rows:
        assert row["prediction"] == answers[row["path"]]
        assert "content" not in row
    file = next(iter(photos.glob("1/*.png")))
    (alone,) = answer("predict", file, "--model", model)["predictions"]
    (path,) = (path for path in answers if path.endswith(f"/1/{file.name}"))
    assert alone["prediction"] == answers[path]


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.needs_data
def test_transfer_on_real_photos_with_real_weights(spark: Any, data_dir: Path, tmp_path: Path) -> None:
    words = ["transfer", data_dir / "caltech101_mini", "--net", "squeezenet1_1", "--out", tmp_path / "model"]
    words += ["--weights", next((data_dir / "squeezenet_v1.1_keras").glob("*.h5")), "--epochs", "20", "--lr", "0.02"]
    data = answer(*words)
    assert sum(data["rows"].values()) == 300
    assert len(data["labels"]) == 10
    assert data["accuracy"]["test"] > 0.8  # 0.1 is chance


@pytest.mark.spark
@pytest.mark.parametrize(("on_error", "rows"), [("keep", 2), ("drop", 1)])
def test_featurize_counts_and_lists_broken_photos(
    spark: Any, photos: Path, tmp_path: Path, on_error: str, rows: int
) -> None:
    (tmp_path / "photos" / "0").mkdir(parents=True)
    good = next(iter(photos.glob("0/*.png"))).read_bytes()
    (tmp_path / "photos" / "0" / "good.png").write_bytes(good)
    (tmp_path / "photos" / "0" / "cut.png").write_bytes(good[:60])
    words = ["featurize", tmp_path / "photos", "--net", "lenet", "--until", "fc1", "--on-error", on_error]
    data = answer(*words, "--out", tmp_path / "f.parquet")
    assert (data["rows"], data["broken"]) == (rows, 1)
    assert [example["path"].rsplit("/", 1)[1] for example in data["examples"]] == ["cut.png"]
    assert data["precision"]["name"] in ("bf16", "fp32")
    kept = {row.path.rsplit("/", 1)[1]: row for row in spark.read.parquet(str(tmp_path / "f.parquet")).collect()}
    assert len(kept["good.png"].features) == 500
    assert "cut.png" not in kept or kept["cut.png"].error


@pytest.mark.spark
def test_fit_a_shipped_net_from_scratch(spark: Any, photos: Path, tmp_path: Path) -> None:
    words = (
        "fit",
        photos,
        "--model",
        "lenet",
        "--epochs",
        "3",
        "--lr",
        "0.05",
        "--batch-size",
        "8",
        "--strategy",
        "allreduce",
    )
    data = answer(*words, "--workers", "2", "--out", tmp_path / "model")
    assert data["history"]["rows"] == 60
    model = kd.load(tmp_path / "model")
    assert model.labels == ("0", "1", "2")
    again = answer(
        "fit",
        photos,
        "--model",
        tmp_path / "model",
        "--freeze",
        "pool2",
        "--epochs",
        "1",
        "--workers",
        "1",
        "--out",
        tmp_path / "b",
    )
    assert again["history"]["rows"] == 60
    frozen, before = kd.load(tmp_path / "b").module.state_dict(), model.module.state_dict()
    assert (frozen["conv1.weight"] == before["conv1.weight"]).all()
    assert (frozen["fc1.weight"] != before["fc1.weight"]).any()


@pytest.mark.spark
def test_preflight_lists_what_it_looked_at(spark: Any, photos: Path, tmp_path: Path) -> None:
    words = ("preflight", photos, "--model", "lenet", "--workers", "2", "--run", tmp_path / "run")
    data = answer(*words)
    assert data["passed"]
    assert {"slots", "executors", "a real batch", "memory"} <= {check["name"] for check in data["checks"]}
    shown = run("preflight", photos, "--model", "lenet", "--workers", "99", code=1).stdout
    assert "FAIL  slots" in shown
    assert "needs 99 task slots" in shown


@pytest.mark.spark
def test_fit_a_net_of_the_user_s(spark: Any, photos: Path, nets: Path) -> None:
    words = ["fit", photos, "--model", "my_nets:needs", "--validation", photos, "--epochs", "9", "--workers", "1"]
    words += [
        "--accumulate",
        "2",
        "--clip-norm",
        "1",
        "--precision",
        "bf16",
        "--warmup-steps",
        "2",
        "--ema-decay",
        "0.5",
    ]
    words += ["--patience", "5", "--max-steps", "4", "--max-minutes", "60", "--batch-size", "10"]
    data = answer(*words, "--out", "model")
    assert kd.load("./model").labels == ("0", "1", "2")
    settings, *_, last = data["history"]["settings"], data["history"]["epochs"][-1]
    assert (settings["accumulate"], settings["clip_norm"], settings["precision"]) == (2, 1.0, "bf16")
    assert (settings["warmup_steps"], settings["ema_decay"], settings["max_seconds"]) == (2, 0.5, 3600.0)
    assert settings["early_stopping"]["patience"] == 5
    assert (last["epoch"], last["steps"], last["stopped"]) == (2, 1, "max_steps")  # 3 steps an epoch


@pytest.mark.spark
def test_what_cannot_be_saved_is_told_before_the_training(spark: Any, photos: Path, nets: Path) -> None:
    """A folder of other things, a file, another file system's bundle: not after hours of training."""
    (nets / "thesis").mkdir()
    (nets / "thesis" / "thesis.tex").write_text("years of work")
    kd.load("lenet").save("memory://cli/model", overwrite=True)
    for out, said in (
        ("thesis", "other files than a bundle"),
        ("my_nets.py", "is a file, not a folder"),
        ("memory://cli/model", "holds a bundle already"),
    ):
        options = ["--overwrite"] if "memory" not in out else []
        for words in (
            ["fit", photos, "--model", "my_nets:needs"],
            ["transfer", photos, "--net", "lenet", "--until", "fc1"],
        ):
            result = run(*words, "--out", out, *options, code=1)
            assert said in result.stderr
            assert "epoch" not in result.stderr
            assert "featurise" not in result.stderr


@pytest.mark.spark
def test_a_run_goes_on_as_it_was_started_but_longer(spark: Any, photos: Path, nets: Path) -> None:
    words = ("fit", photos, "--model", "my_nets:needs", "--validation", photos, "--epochs", "2", "--workers", "1")
    run(*words, "--out", "model", "--run", "run")
    assert kd.load("./model").labels == ("0", "1", "2")
    # As it was started, but longer.
    again = answer("fit", "--resume", "run", "--epochs", "3", "--overwrite")
    assert again["model"] == "model"
    assert len(again["history"]["epochs"]) == 3
    assert [resumed["epoch"] for resumed in again["history"]["resumed"]] == [3]
    assert kd.load("./model").history[-1]["settings"]["epochs"] == 3
    refused = run("fit", "--resume", "run", "--epochs", "3", "--overwrite", "--seed", "5", code=1)
    assert "settings.seed: was 0, is 5" in refused.stderr


def test_a_run_that_no_command_started_is_not_resumed(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"version": 2, "about": {}}')
    assert "was not started by `kindling fit`" in run("fit", "--resume", tmp_path, code=1).stderr
    assert "holds no run" in run("fit", "--resume", tmp_path / "nothing", code=1).stderr
    assert "DATA, --model and --out are needed" in run("fit", "data", "--out", "model", code=2).stderr


@pytest.mark.spark
def test_spark_s_errors_are_short(spark: Any, tmp_path: Path) -> None:
    result = run("evaluate", tmp_path / "nothing-here", "--model", "lenet", code=1)
    assert "nothing-here" in result.stderr
    assert "at org.apache" not in result.stderr
    assert len(result.stderr.splitlines()) <= console.SCREEN


@pytest.mark.spark
@pytest.mark.slow
def test_under_spark_submit(photos: Path, tmp_path: Path) -> None:
    import pyspark

    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    words = [
        "transfer",
        photos,
        "--net",
        "lenet",
        "--until",
        "fc1",
        "--out",
        "model",
        "--epochs",
        "2",
        "--workers",
        "2",
        "--json",
    ]
    command = [submit, "--master", "local[2]", "--driver-memory", "1g", ROOT / "src/kindling/__main__.py", *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_"))}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=tmp_path,
        env={**clean, "PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Spark's launcher joins the program's stdout and stderr; the result is the last line.
    data = json.loads(done.stdout.splitlines()[-1])
    assert sum(data["rows"].values()) == 60
    assert (tmp_path / "model" / "kindling.json").exists()


@pytest.mark.spark
def test_an_error_under_spark_submit_fails_the_application(tmp_path: Path) -> None:
    import pyspark

    submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    command = [str(submit), "--master", "local[1]", str(ROOT / "src/kindling/__main__.py"), "summary", "lennet"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SPARK_", "PYSPARK_"))}
    environment = {**clean, "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "Did you mean 'lenet'" in done.stdout + done.stderr


@pytest.mark.spark
def test_transfer_when_a_class_has_no_photo_to_train_on(spark: Any, photos: Path, tmp_path: Path) -> None:
    """One photo of a fourth class falls on validation or test: it counts as one more wrong answer, and it is said."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "rare").mkdir()
    good = next(iter(photos.glob("0/*.png"))).read_bytes()
    frame = kd.read.images(str(folder), spark=spark)
    for number in range(20):
        shutil.rmtree(folder / "rare")
        (folder / "rare").mkdir()
        (folder / "rare" / f"{number}.png").write_bytes(good)
        frame = kd.read.images(str(folder), spark=spark)
        if kd.split(frame, 0.6, 0.2, 0.2)[0].where("label = 'rare'").count() == 0:
            break
    words = ["transfer", folder, "--net", "lenet", "--until", "fc1", "--split", ".6,.2,.2", "--epochs", 1]
    done = run(*words, "--out", tmp_path / "model", "--workers", 2, "--json")
    data = json.loads(done.stdout)
    assert data["labels"] == ["0", "1", "2", "rare"]
    assert sum(data["rows"].values()) == 61
    assert "1 of the 4 labels have no photo in the train share (rare)" in done.stderr
