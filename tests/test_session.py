"""`kindling.spark`: what it finds, what it sets, what it leaves alone, and what it says when something is missing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kindling import session
from kindling.errors import ConfigError, MissingExtraError, SessionError


def fake_java(home: Path, version: str) -> Path:
    """A folder that looks like a Java of that version."""
    program = home / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2020-01-01' >&2\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return home


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No Java anywhere but where a test puts one."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path' / 'bin'}:/bin")
    monkeypatch.setattr(session, "_JAVA_PLACES", (f"{tmp_path}/usual/*",))
    if (Path("/bin") / "java").exists():
        monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    return tmp_path


# Java


def test_missing_java_is_one_sentence_with_the_fix(bare_machine: Path) -> None:
    with pytest.raises(
        SessionError, match=r"^Spark needs Java 17 or newer, which is not on this machine: install"
    ) as caught:
        session.find_java()
    assert "\n" not in str(caught.value)
    assert "apt install openjdk-17-jre-headless" in str(caught.value)


def test_the_first_spark_call_says_that_java_is_missing(tmp_path: Path) -> None:
    program = (
        "import kindling, kindling.session as s\n"
        "s._JAVA_PLACES = ()\n"
        "try: kindling.spark('local[1]')\n"
        "except kindling.errors.SessionError as error: print(error)"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "SPARK_REMOTE") and "PYSPARK" not in k}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**clean, "PATH": str(tmp_path)},
        check=False,
    )
    assert done.stdout.startswith("Spark needs Java 17"), done.stderr
    assert done.stdout.count("\n") == 1


def test_an_old_java_is_named_and_passed_over(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fake_java(bare_machine / "usual" / "jdk-11", "11.0.20")
    with pytest.raises(SessionError, match="jdk-11 is Java 11"):
        session.find_java()
    eight = fake_java(bare_machine / "eight", "1.8.0_392")
    monkeypatch.setenv("JAVA_HOME", str(eight))
    with pytest.raises(SessionError, match=r"eight is Java 8; .*jdk-11 is Java 11"):
        session.find_java()
    new = fake_java(bare_machine / "usual" / "jdk-21", "21.0.1")
    assert session.find_java() == new
    assert session.find_java(oldest=8) == eight
    assert session.find_java(oldest=9) == new  # a long-term version before others of the usual places
    assert session.find_java(oldest=9, newest=11) == old


def test_java_home_comes_before_the_path_and_the_path_before_the_usual_places(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = fake_java(bare_machine / "usual" / "java-17", "17.0.9")
    assert session.find_java() == usual
    on_path = fake_java(bare_machine / "path", "21")
    assert session.find_java() == on_path
    home = fake_java(bare_machine / "home", "25-ea")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert session.find_java() == home
    assert session.find_java(newest=23) == on_path


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\necho hello\n", ""])
def test_a_java_that_does_not_run_is_passed_over(
    bare_machine: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    broken = fake_java(bare_machine / "broken", "17")
    (broken / "bin" / "java").write_text(script)
    monkeypatch.setenv("JAVA_HOME", str(broken))
    with pytest.raises(SessionError, match="broken is no Java that runs"):
        session.find_java()
    monkeypatch.setenv("JAVA_HOME", str(bare_machine / "nowhere"))
    with pytest.raises(SessionError, match="nowhere is no Java that runs"):
        session.find_java()


def test_the_environment_is_put_back_after_the_launch(bare_machine: Path) -> None:
    home = fake_java(bare_machine / "usual" / "java-17", "17.0.9")
    before = dict(os.environ)
    with session._launching("local[2]", (4, 3)):
        assert os.environ["JAVA_HOME"] == str(home)
        assert os.environ.get("PYSPARK_PYTHON") in (before.get("PYSPARK_PYTHON"), sys.executable)
        assert os.environ["OMP_WAIT_POLICY"] == before.get("OMP_WAIT_POLICY", "PASSIVE")
    assert dict(os.environ) == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere Java spells all names")
def test_java_gets_a_locale_that_spells_every_name(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_java(bare_machine / "usual" / "java-17", "17.0.9")
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for settings, seen in (
        ({}, "C.UTF-8"),
        ({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, "C.UTF-8"),
        ({"LC_CTYPE": "POSIX"}, "C.UTF-8"),
        ({"LANG": "de_DE.ISO-8859-1"}, None),  # names may really be spelt so
        ({"LANG": "de_DE.UTF-8"}, None),
        ({"LC_ALL": "en_US.utf8", "LANG": "C"}, "en_US.utf8"),
    ):
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            with session._launching("local[2]", (4, 3)):
                assert os.environ.get("LC_ALL") == seen
            assert os.environ.get("LC_ALL") == settings.get("LC_ALL")


# Settings


@pytest.fixture
def no_spark_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process, whatever runs in this one."""
    monkeypatch.setattr(session, "active_session", lambda: None)
    for name in ("PYSPARK_SUBMIT_ARGS", "SPARK_CONF_DIR", "SPARK_HOME", "PYSPARK_GATEWAY_PORT", "SPARK_REMOTE"):
        monkeypatch.delenv(name, raising=False)


def test_settings_from_elsewhere_are_found(no_spark_yet: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "spark-defaults.conf").write_text(
        "# ours\nspark.driver.memory   9g\nspark.ui.enabled=true\n"
        " spark.executor.extraJavaOptions -Da=b -Dc=d\n\nother 1\n"
    )
    monkeypatch.setenv("SPARK_CONF_DIR", str(tmp_path))
    monkeypatch.setenv(
        "PYSPARK_SUBMIT_ARGS", "--master local[3] --conf spark.driver.memory=7g --conf 'spark.x=a b' pyspark-shell"
    )
    assert session._settings_elsewhere() == {
        "spark.master": "local[3]",
        "spark.driver.memory": "7g",
        "spark.x": "a b",
        "spark.ui.enabled": "true",
        "spark.executor.extraJavaOptions": "-Da=b -Dc=d",
    }


def test_workers_threads_given_by_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert session._defaults("local[2]", (4, 3))["spark.executorEnv.OMP_NUM_THREADS"] == "7"
    with session._launching("local[2]", (4, 3)):
        assert os.environ["OMP_NUM_THREADS"] == "7"


def test_only_local_masters_are_bound_to_this_machine() -> None:
    assert session._defaults("local-cluster[2,1,1024]", (4, 3))["spark.driver.bindAddress"] == "127.0.0.1"
    far = session._defaults("spark://host:7077", (4, 3))
    assert not {"spark.driver.host", "spark.driver.bindAddress", "spark.ui.enabled", "spark.driver.memory"} & far.keys()
    assert far["spark.barrier.sync.timeout"].endswith("s")


def test_batches_are_counted_in_rows_only_where_they_must() -> None:
    rows = "spark.sql.execution.arrow.maxRecordsPerBatch"
    assert rows in session._defaults("local", (3, 5))
    assert rows not in session._defaults("local", (4, 3))


# Refusals


def test_master_and_remote_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="remote='sc://h' cannot be combined with master='local'"):
        session.spark("local", "sc://h")


def test_connect_on_an_old_spark_says_what_to_do(no_spark_yet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_pyspark_version", lambda: (3, 5))
    with pytest.raises(SessionError, match=r"needs pyspark 4.0 or newer, this is 3.5\. Use master="):
        session.spark(remote="local[2]")


def test_connect_without_its_packages_names_the_extra(no_spark_yet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_pyspark_version", lambda: (4, 3))
    monkeypatch.setitem(sys.modules, "pyspark.sql.connect.session", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kindling-spark\[connect\]'"):
        session.spark(remote="local[2]")


def test_an_old_pyspark_is_refused(no_spark_yet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyspark.__version__", "3.4.1")
    with pytest.raises(SessionError, match=r"pyspark 3\.4\.1 is too old"):
        session.spark("local[1]")


# The session itself


@pytest.mark.spark
@pytest.mark.sessions
def test_the_running_session_is_returned(spark: Any) -> None:
    assert session.active_session() is spark
    assert session.spark() is spark


@pytest.mark.spark
@pytest.mark.sessions
def test_a_running_session_takes_settings_that_can_change(spark: Any) -> None:
    before = spark.conf.get("spark.sql.shuffle.partitions")
    try:
        assert session.spark(sql_shuffle_partitions=3) is spark
        assert spark.conf.get("spark.sql.shuffle.partitions") == "3"
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)
    with pytest.raises(SessionError, match=r"spark\.driver\.memory is .* cannot become '77g' now"):
        session.spark(driver_memory="77g")


@pytest.mark.spark
@pytest.mark.sessions
def test_another_master_beside_a_running_session_is_refused(spark: Any) -> None:
    with pytest.raises(SessionError, match=r"runs in this process already, so 'local\[77\]' cannot be started"):
        session.spark("local[77]")


def _probe(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
        yield pa.RecordBatch.from_pydict(
            {"python": [sys.executable] * len(batch), **{name: [os.environ.get(name)] * len(batch) for name in names}}
        )


@pytest.mark.spark
@pytest.mark.sessions
def test_workers_run_this_python_with_quiet_threads(spark: Any) -> None:
    row = spark.range(1).mapInArrow(_probe, "python string, OMP_NUM_THREADS string, OMP_WAIT_POLICY string").head()
    assert row.python == sys.executable
    assert row.OMP_NUM_THREADS == "1"
    assert row.OMP_WAIT_POLICY == "PASSIVE"


@pytest.mark.slow
@pytest.mark.spark
def test_a_whole_life_in_a_fresh_process(tmp_path: Path) -> None:
    """Start, use, stop, start again, on Classic; the user's settings stand; nothing is left in the environment."""
    program = """
import os, kindling
before = dict(os.environ)
spark = kindling.spark("local[1]", driver_memory="700m", conf={"spark.ui.showConsoleProgress": True})
conf = spark.sparkContext.getConf()
assert conf.get("spark.driver.memory") == "700m" and conf.get("spark.ui.showConsoleProgress") == "true"
assert conf.get("spark.driver.bindAddress") == "127.0.0.1"
assert spark.range(5).count() == 5
spark.stop()
assert kindling.session.active_session() is None
spark = kindling.spark("local[2]")
assert spark.sparkContext.master == "local[2]"
assert spark.sparkContext.getConf().get("spark.ui.showConsoleProgress") == "false"
spark.stop()
changed = {k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k)}
assert all(k.startswith(("SPARK_", "PYSPARK_")) for k in changed), changed
print("lived")
"""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("SPARK_REMOTE", "SPARK_LOCAL_REMOTE", "SPARK_CONNECT_MODE_ENABLED")
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean, cwd=tmp_path, check=False
    )
    assert done.stdout.strip().endswith("lived"), done.stderr[-2000:]
