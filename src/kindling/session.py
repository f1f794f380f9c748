"""`kindling.spark()`: a SparkSession fit for this work. Any other session works too.

Finds a Java that Spark can run on, starts it in a locale that can spell every file's name, gives workers this Python
and quiet thread pools, and sets what Spark's defaults get wrong for deep learning. Settings of Spark that the user
made, in code, in the environment, on spark-submit's command line or in spark-defaults.conf, are never changed. Starting
is all it does: reading is `read/`, sending files is `ship.py`.
"""

from __future__ import annotations

import atexit
import glob
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kindling.errors import ConfigError, MissingExtraError, SessionError
from kindling.threads import environment

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_LOG = logging.getLogger("kindling.session")

OLDEST_SPARK = (3, 5)
OLDEST_CONNECT = (4, 0)
OLDEST_JAVA = 17

_JAVA_PLACES = (
    f"{sys.prefix}/lib/jvm",  # conda's openjdk
    f"{sys.prefix}/Library",  # the same on Windows
    "/usr/lib/jvm/*",
    "/usr/java/*",
    "/opt/java/*",
    "/opt/jdk*",
    "/opt/homebrew/opt/openjdk*/libexec/openjdk.jdk/Contents/Home",
    "/usr/local/opt/openjdk*/libexec/openjdk.jdk/Contents/Home",
    "/Library/Java/JavaVirtualMachines/*/Contents/Home",
    "~/.sdkman/candidates/java/*",
    "~/.jdks/*",
    "C:/Program Files/Java/*",
    "C:/Program Files/Eclipse Adoptium/*",
)


def spark(
    master: str | None = None,
    remote: str | None = None,
    *,
    app: str = "kindling",
    conf: Mapping[str, Any] | None = None,
    **settings: Any,
) -> SparkSession:
    """A SparkSession: the one that is active already, else a new one with settings that suit training and prediction.

    Args:
        master: `"local[4]"`, `"local-cluster[2,1,1024]"`, `"spark://host:7077"`, `"yarn"` ...; None: what spark-submit,
            spark-defaults.conf or `$MASTER` say, else `"local[*]"`.
        remote: a Spark Connect server, `"sc://host:15002"`, or `"local[4]"` to start one on this machine.
        app: the application's name, where none is set elsewhere.
        conf: Spark settings by their full names; these win over everything chosen here.
        settings: Spark settings as keywords, underscores for dots and without `spark.`: `driver_memory="8g"`.
    Returns: a Classic or a Connect session. A session that runs already is returned as it is, with `conf` applied to
        it where Spark allows that at run time.
    Raises: SessionError, where Java 17 or newer is missing, pyspark is too old, or a session with another master runs
        already; MissingExtraError, where Connect's packages are missing; ConfigError, for `master` with `remote`.

    >>> session = spark("local[2]", ui_enabled=False)  # doctest: +SKIP
    """
    if master is not None and remote is not None:
        raise ConfigError("remote", remote, f"cannot be combined with master={master!r}", "Give one of them")
    given = {
        **{str(k): _text(v) for k, v in (conf or {}).items()},
        **{_full_name(k): _text(v) for k, v in settings.items()},
    }
    version = _pyspark_version()
    active = active_session()
    if active is not None:
        return _adopt(active, master, remote, given)
    if remote is None and master is None and "spark.master" not in given:
        remote = os.environ.get("SPARK_REMOTE")
    if remote is not None:
        return _connect(remote, app, given, version)
    return _classic(master, app, given, version)


def active_session() -> Any | None:
    """The session that runs in this process, or None. Never starts one, never imports pyspark.

    >>> active_session() is None or hasattr(active_session(), "createDataFrame")
    True
    """
    sql = sys.modules.get("pyspark.sql")
    if sql is None:
        return None
    connect = sys.modules.get("pyspark.sql.connect.session")
    if connect is not None:
        session = connect.SparkSession.getActiveSession()
        if session is None:
            session = getattr(connect.SparkSession, "_default_session", None)
        if session is not None and not getattr(session, "is_stopped", False):
            return session
    # `getActiveSession` knows only the current thread's; a notebook's worker thread should find it too.
    session = getattr(sql.SparkSession, "_instantiatedSession", None)
    if session is not None and getattr(session, "_sc", None) is not None and session._sc._jsc is not None:
        return session
    return None


def find_java(oldest: int = OLDEST_JAVA, newest: int | None = None) -> Path:
    """Home folder of a Java that is neither too old nor too new: JAVA_HOME's, else PATH's, else of the usual places.

    Raises: SessionError, in one sentence with the fix.

    >>> (find_java() / "bin" / "java").exists()
    True
    """
    seen: list[str] = []
    for home in _java_homes():
        version = _java_version(home)
        if version is not None and oldest <= version <= (newest or version):
            return home
        seen.append(f"{home} is " + (f"Java {version}" if version else "no Java that runs"))
    found = f" (found: {'; '.join(seen[:4])})" if seen else ""
    wanted = f"Java {oldest} to {newest}" if newest else f"Java {oldest} or newer"
    raise SessionError(
        f"Spark needs {wanted}, which is not on this machine{found}: install one "
        "(`apt install openjdk-17-jre-headless`, `brew install openjdk@17` or `conda install openjdk=17`) "
        "or set JAVA_HOME to its folder."
    )


def _java_homes() -> Iterator[Path]:
    """Candidates, best first, each once."""
    seen: set[Path] = set()
    given = os.environ.get("JAVA_HOME")
    on_path = shutil.which("java")
    homes = [Path(given)] if given else []
    # macOS keeps a stub at /usr/bin/java that finds the real one itself; its "home" is /usr, which works as one.
    homes += [Path(on_path).resolve().parent.parent] if on_path else []
    for place in _JAVA_PLACES:
        # Long-term versions first: the newest Java is often newer than Spark.
        homes += sorted((Path(p) for p in glob.glob(str(Path(place).expanduser()))), key=_age)
    for home in homes:
        real = home.resolve() if home.exists() else home
        if real not in seen:
            seen.add(real)
            if home == Path(given or "") or _java_binary(home).exists():
                yield home


def _age(home: Path) -> tuple[int, str]:
    for place, version in enumerate(("17", "21")):
        if re.search(rf"(?<!\d){version}(?!\d)", home.name):
            return place, str(home)
    return 9, str(home)


def _java_binary(home: Path) -> Path:
    return home / "bin" / ("java.exe" if os.name == "nt" else "java")


def _java_version(home: Path) -> int | None:
    try:
        done = subprocess.run(
            [str(_java_binary(home)), "-version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(match.group(1)) if match and done.returncode == 0 else None


def _pyspark_version() -> tuple[int, int]:
    try:
        import pyspark
    except ImportError as error:
        raise SessionError(f"pyspark cannot be imported ({error}). Run: pip install 'pyspark>=3.5'.") from error
    major, minor = (int(part) for part in re.findall(r"\d+", pyspark.__version__)[:2])
    if (major, minor) < OLDEST_SPARK:
        raise SessionError(
            f"pyspark {pyspark.__version__} is too old, kindling needs 3.5 or newer. Run: pip install -U pyspark."
        )
    return major, minor


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _full_name(keyword: str) -> str:
    name = keyword.replace("_", ".")
    return name if name.startswith("spark.") else f"spark.{name}"


def _is_local(master: str) -> bool:
    return master.startswith("local")


# Classic


def _classic(master: str | None, app: str, given: dict[str, str], version: tuple[int, int]) -> SparkSession:
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    elsewhere = _settings_elsewhere()
    asked = (
        master or given.get("spark.master") or elsewhere.get("spark.master") or os.environ.get("MASTER") or "local[*]"
    )
    options = _defaults(asked, version) | {"spark.app.name": app}
    options = {k: v for k, v in options.items() if k not in elsewhere} | given | {"spark.master": asked}
    with _launching(asked, version):
        builder = SparkSession.builder
        for key, value in options.items():
            builder = builder.config(key, value)
        try:
            session: SparkSession = builder.getOrCreate()
        except PySparkException as error:
            raise SessionError(f"Spark could not be started with master {asked!r}: {first_line(error)}.") from error
        except Exception as error:
            if type(error).__module__.startswith("py4j"):
                raise SessionError(f"Spark could not be started with master {asked!r}: {first_line(error)}.") from error
            raise
        finally:
            # The builder is one object for the whole process; what we put in would leak into later sessions.
            for key in options:
                getattr(SparkSession.builder, "_options", {}).pop(key, None)
    if version < (4, 0) and "PYSPARK_GATEWAY_PORT" in os.environ and _is_local(asked):
        atexit.register(_let_the_jvm_end, session)
    return session


def _let_the_jvm_end(session: SparkSession) -> None:
    """Spark 3.5 never stops its barrier's timer; where that runs in a local master's JVM, spark-submit never ends."""
    with suppress(Exception):  # a JVM that is gone needs no help
        barrier = getattr(getattr(session._jvm, "org.apache.spark.BarrierTaskContext$"), "MODULE$")
        getattr(barrier, "org$apache$spark$BarrierTaskContext$$timer")().cancel()


def _defaults(master: str, version: tuple[int, int]) -> dict[str, str]:
    """What suits this work better than Spark's own defaults; every entry yields to the user's."""
    options = {
        # A survivor that waits in Spark's barrier for a dead peer holds its slot until this passes; Spark waits a year.
        # The workers of a training may end their spooling that far apart.
        "spark.barrier.sync.timeout": "300s",
        # A barrier stage that can never get its slots fails after a minute, not after ten.
        "spark.scheduler.barrier.maxConcurrentTasksCheck.interval": "5s",
        "spark.scheduler.barrier.maxConcurrentTasksCheck.maxFailures": "12",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
        # kindling shows its own progress.
        "spark.ui.showConsoleProgress": "false",
        **{f"spark.executorEnv.{name}": os.environ.get(name, value) for name, value in environment(1).items()},
    }
    if version < (4, 1):
        # These count an Arrow batch in rows only, 10,000 of them; later ones bound it by bytes too.
        options["spark.sql.execution.arrow.maxRecordsPerBatch"] = "512"
    if _is_local(master):
        options |= {
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.driver.memory": _driver_memory(),
            # Executors elsewhere may lack this package.
            "spark.python.daemon.module": "kindling.daemon",
        }
    return options


def _driver_memory() -> str:
    """A quarter of the machine's memory, between 1 and 8 GiB: the heavy work happens outside the JVM."""
    try:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    except (AttributeError, ValueError, OSError):
        gib = 8
    return f"{min(8, max(1, gib // 4))}g"


@contextmanager
def _launching(master: str, version: tuple[int, int]) -> Iterator[None]:
    """The environment in which Spark's JVM starts; put back as it was afterwards."""
    changes: dict[str, str] = {}
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # spark-submit has started the JVM already
        # Java 24 took away what the Hadoop client of older Sparks is built on.
        home = find_java(newest=None if version >= (4, 1) else 23)
        if os.environ.get("JAVA_HOME") != str(home):
            _LOG.info("Spark runs on the Java in %s", home)
            changes["JAVA_HOME"] = str(home)
        if sys.platform == "linux" and _locale() in ("", "C", "POSIX"):
            # There Java passes over files with names beyond ASCII, without a word: whole classes of photos.
            changes["LC_ALL"] = "C.UTF-8"
    if _is_local(master):
        # Unset, the workers would run whatever `python3` is first on the PATH.
        # Connect's workers know no executorEnv, they inherit what the JVM is started with.
        changes |= {
            k: v for k, v in {"PYSPARK_PYTHON": sys.executable, **environment(1)}.items() if not os.environ.get(k)
        }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _locale() -> str:
    """The locale that a program started here would spell file names by."""
    return next((os.environ[name] for name in ("LC_ALL", "LC_CTYPE", "LANG") if os.environ.get(name)), "")


def _settings_elsewhere() -> dict[str, str]:
    """Spark settings given outside this program: spark-submit, PYSPARK_SUBMIT_ARGS, spark-defaults.conf."""
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        from pyspark import SparkConf, SparkContext

        SparkContext._ensure_initialized()
        return dict(SparkConf().getAll())
    arguments = shlex.split(os.environ.get("PYSPARK_SUBMIT_ARGS", ""))
    found: dict[str, str] = {}
    files = []
    flags = {"--master": "spark.master", "--name": "spark.app.name", "--driver-memory": "spark.driver.memory"}
    for flag, value in pairwise(arguments):
        if flag in ("--conf", "-c") and "=" in value:
            key, _, text = value.partition("=")
            found[key.strip()] = text
        elif flag in flags:
            found[flags[flag]] = value
        elif flag == "--properties-file":
            files.append(Path(value))
    if not files:
        home = os.environ.get("SPARK_HOME")
        folder = os.environ.get("SPARK_CONF_DIR") or (f"{home}/conf" if home else None)
        files = [Path(folder) / "spark-defaults.conf"] if folder else []
    for file in files:
        if file.is_file():
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                match = re.match(r"\s*(spark\.[^\s=:]+)\s*[=:\s]\s*(.*?)\s*$", line)
                if match:
                    found.setdefault(match.group(1), match.group(2))
    return found


# Connect


def _connect(remote: str, app: str, given: dict[str, str], version: tuple[int, int]) -> SparkSession:
    if version < OLDEST_CONNECT:
        raise SessionError(
            f"remote={remote!r} needs pyspark 4.0 or newer, this is {version[0]}.{version[1]}. "
            "Use master=... here, or run: pip install -U 'pyspark[connect]'."
        )
    try:
        from pyspark.sql.connect.session import SparkSession as _  # noqa: F401
    except ImportError as error:
        raise MissingExtraError.of(
            f"Spark Connect (remote={remote!r})", "grpcio and its companions", "connect"
        ) from error
    from pyspark.sql import SparkSession

    options = dict(given)
    if _is_local(remote):
        elsewhere = _settings_elsewhere()
        options = {
            k: v for k, v in (_defaults(remote, version) | {"spark.app.name": app}).items() if k not in elsewhere
        } | given
    builder = SparkSession.builder.remote(remote)
    for key, value in options.items():
        builder = builder.config(key, value)
    try:
        with _launching(remote, version) if _is_local(remote) else nullcontext(), warnings.catch_warnings():
            # pyspark sets the server's own settings, which the server started with, once more as the client's.
            warnings.filterwarnings("ignore", "Failed to set spark")
            session: SparkSession = builder.getOrCreate()
    except SessionError:
        raise
    except Exception as error:
        raise SessionError(f"no Spark Connect session with {remote!r}: {first_line(error)}.") from error
    finally:
        for key in (*options, "spark.remote"):
            getattr(SparkSession.builder, "_options", {}).pop(key, None)
    return session


# A session that runs already


def _adopt(session: Any, master: str | None, remote: str | None, given: Mapping[str, str]) -> Any:
    """The running session, with the user's settings applied where that can be done; refused where it is another one."""
    context = getattr(session, "_sc", None) if "connect" not in type(session).__module__ else None
    running = context.master if context is not None else "Spark Connect"
    asked = master or given.get("spark.master")
    if (asked is not None and asked != running) or (remote is not None and context is not None):
        raise SessionError(
            f"a Spark session ({running}) runs in this process already, "
            f"so {asked or remote!r} cannot be started beside it: "
            "call its stop() first, or leave the argument out to use it."
        )
    for key, value in given.items():
        if key in ("spark.master", "spark.app.name"):
            continue
        now = context.getConf().get(key) if context is not None else None
        if now == value:
            continue
        if not session.conf.isModifiable(key):
            raise SessionError(
                f"{key} is {now!r} in the Spark session that runs already and cannot become {value!r} now: "
                "stop() that session first, or leave the setting out."
            )
        session.conf.set(key, value)
    return session


def first_line(error: BaseException) -> str:
    """What a Spark exception says, without its Java stack trace.

    >>> first_line(RuntimeError("An error occurred.\\n: java.io.IOException: no disk\\n\\tat java"))
    'java.io.IOException: no disk'
    """
    lines = [line.strip().lstrip(": ") for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("at ")]
    java = [line for line in lines if re.match(r"[\w.$]+(Exception|Error)\b", line)]
    return (java or lines or [type(error).__name__])[0].rstrip(".")
