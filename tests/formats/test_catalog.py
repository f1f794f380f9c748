"""Downloads against a real server on this machine: whole, wrong, cut short, interrupted; and the table's own facts."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from kindling.errors import ConfigError, FormatError, StorageError
from kindling.formats import CATALOG, cache_folder, download
from kindling.formats.catalog import fetch, find, published_as
from kindling.nets import NETS, load_net, squeezenet1_1

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does with the next requests, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    behaviour: str = "good"
    failures: int = 0
    """How many requests are cut short before it behaves."""
    requests: list[dict[str, str]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        headers = dict(handler.headers)
        self.requests.append({"path": handler.path, **headers})
        etag = '"' + hashlib.md5(self.content).hexdigest() + '"'
        if self.behaviour == "missing":
            handler.send_error(404)
            return
        if self.behaviour == "busy" and len(self.requests) <= self.failures:
            handler.send_error(503)
            return
        if self.behaviour == "redirect" and handler.path != "/moved":
            handler.send_response(302)
            handler.send_header("Location", "/moved")
            handler.end_headers()
            return
        body, status, start = self.content, 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", headers.get("Range", ""))
        if wanted and self.behaviour != "no ranges" and headers.get("If-Range") == etag:
            start, status = int(wanted[1]), 206
            body = body[start:]
        handler.send_response(status)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.behaviour != "no length":
            handler.send_header("Content-Length", str(len(body)))
        if self.behaviour != "no etag":
            handler.send_header("ETag", etag)
        handler.end_headers()
        if len(self.requests) <= self.failures:
            body = body[: len(body) // 3]
            if self.behaviour == "changes":
                self.content = bytes(reversed(self.content))
        handler.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("kindling.formats.catalog.time.sleep", lambda seconds: None)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_address[1]}/weights.bin"
        yield state
        http.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_good_file_comes_once(server: Server, tmp_path: Path) -> None:
    first = download(f"{server.url}#sha256={SHA256}", cache=tmp_path, progress=False)
    again = download(f"{server.url}#sha256={SHA256[:8]}", cache=tmp_path, progress=False)
    assert first == again
    assert first.read_bytes() == CONTENT
    assert first.name.endswith("-weights.bin")
    assert len(server.requests) == 1
    assert names(tmp_path) == [first.name]


def test_the_wrong_content_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=rf"sha256 is {SHA256}; published is {'0' * 64}"):
        download(f"{server.url}#sha256={'0' * 64}", cache=tmp_path, progress=False)
    assert names(tmp_path) == []
    with pytest.raises(FormatError, match="md5 is"):
        fetch(server.url, tmp_path / "w", digest="md5:" + "0" * 32, progress=False)
    assert names(tmp_path) == []


def test_a_broken_connection_is_taken_up_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.failures = 2
    path = download(server.url, cache=tmp_path, progress=False)
    assert path.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=1000000-", "bytes=1666666-"]


@pytest.mark.parametrize("behaviour", ["no ranges", "no etag"])
def test_where_it_cannot_be_taken_up_it_starts_again(server: Server, tmp_path: Path, behaviour: str) -> None:
    server.behaviour, server.failures = behaviour, 2
    assert download(server.url, cache=tmp_path, progress=False).read_bytes() == CONTENT


def test_a_file_that_changes_meanwhile_is_not_glued_together(server: Server, tmp_path: Path) -> None:
    server.behaviour, server.failures = "changes", 1
    assert download(server.url, cache=tmp_path, progress=False).read_bytes() == bytes(reversed(CONTENT))


def test_a_file_that_is_always_cut_short_is_an_error_and_not_kept(server: Server, tmp_path: Path) -> None:
    server.behaviour, server.failures = "no ranges", 99
    with pytest.raises(StorageError, match=r"not be fetched whole in 4 attempts: 1,000,000 of 3,000,000 bytes came"):
        download(server.url, cache=tmp_path, progress=False)
    assert names(tmp_path) == []
    assert len(server.requests) == 4


def test_without_an_announced_length_the_digest_still_tells(server: Server, tmp_path: Path) -> None:
    server.behaviour, server.failures = "no length", 1
    with pytest.raises(FormatError, match="published is"):
        download(f"{server.url}#sha256={SHA256}", cache=tmp_path, progress=False)
    assert names(tmp_path) == []


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server: Server, tmp_path: Path) -> None:
    server.behaviour, server.failures = "busy", 2
    assert download(server.url, cache=tmp_path, progress=False).read_bytes() == CONTENT
    server.behaviour = "missing"
    before = len(server.requests)
    with pytest.raises(StorageError, match=r"answered 404 .*Is the address right\?"):
        download(server.url + "x", cache=tmp_path, progress=False)
    assert len(server.requests) == before + 1


def test_redirections_are_followed(server: Server, tmp_path: Path) -> None:
    server.behaviour = "redirect"
    assert download(server.url, cache=tmp_path, progress=False).read_bytes() == CONTENT


def test_nobody_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Connection refused.*fetch the file elsewhere and give its path"):
        download("http://127.0.0.1:9/weights.bin", cache=tmp_path, progress=False)


def test_an_interruption_leaves_nothing_behind(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        assert [name for name in names(tmp_path) if name.endswith(".part")]
        raise KeyboardInterrupt

    monkeypatch.setattr("kindling.formats.catalog._copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(server.url, cache=tmp_path, progress=False)
    assert names(tmp_path) == []


@pytest.mark.parametrize("known", [True, False])
def test_damage_in_the_cache_is_noticed(server: Server, tmp_path: Path, known: bool) -> None:
    url = f"{server.url}#sha256={SHA256}" if known else server.url
    path = download(url, cache=tmp_path, progress=False)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert download(url, cache=tmp_path, progress=False).read_bytes() == CONTENT
    assert len(server.requests) == 2
    assert download(url, cache=tmp_path, progress=False).read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_bad_download_does_not_replace_a_good_file(server: Server, tmp_path: Path) -> None:
    place = tmp_path / "w"
    fetch(server.url, place, digest=f"sha256:{SHA256}", progress=False)
    server.content = b"another"
    with pytest.raises(FormatError):
        fetch(server.url, place, digest="sha256:" + "1" * 64, progress=False)
    assert place.read_bytes() == CONTENT


def test_two_urls_that_end_alike_are_kept_apart(server: Server, tmp_path: Path) -> None:
    base = server.url.rpartition("/")[0]
    first = download(f"{base}/a/w.pth", cache=tmp_path, progress=False)
    second = download(f"{base}/b/w.pth?x=../../etc", cache=tmp_path, progress=False)
    assert first != second
    assert first.parent == second.parent == tmp_path


def test_what_is_no_name_and_no_url() -> None:
    with pytest.raises(ConfigError, match=r"neither a known name nor an http\(s\) URL"):
        download("ftp://host/x.pth")
    with pytest.raises(ConfigError, match=r"End it in #sha256=HEX"):
        download("http://127.0.0.1:9/x.pth#sha256=xyz")


def test_the_progress_bar_goes_to_stderr(server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    download(server.url, cache=tmp_path, progress=True)
    assert capfd.readouterr().out == ""


def test_a_cache_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="KINDLING_CACHE"):
        download(server.url, cache=tmp_path / "file" / "cache", progress=False)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KINDLING_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("KINDLING_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "kindling"


def test_a_net_from_a_url(server: Server, tmp_path: Path) -> None:
    net = squeezenet1_1(classes=3)
    layers = NETS["squeezenet1_1"].layouts[0].layers
    state = {f"{layers[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": v for n, v in net.state_dict().items()}
    server.content = save(state)
    parts = load_net("squeezenet1_1", server.url, cache=tmp_path, progress=False)
    assert parts.source["url"] == server.url
    assert parts.source["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert all(torch.equal(value, parts.module.state_dict()[name]) for name, value in net.state_dict().items())
    load_net("squeezenet1_1", server.url, cache=tmp_path, progress=False)
    assert len(server.requests) == 1


def test_a_published_name_is_fetched_from_its_url(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    entry = CATALOG["vgg16-torchvision"]
    mine = replace(entry, url=server.url, digest=f"sha256:{SHA256[:8]}")
    monkeypatch.setattr("kindling.formats.catalog.CATALOG", {mine.name: mine})
    path = download("vgg16-torchvision", cache=tmp_path, progress=False)
    assert path == tmp_path / "weights.bin"
    assert path.read_bytes() == CONTENT


# The table


@pytest.mark.parametrize("entry", CATALOG.values(), ids=CATALOG.keys())
def test_the_tables_facts_hang_together(entry: object) -> None:
    from kindling.formats import Published

    assert isinstance(entry, Published)
    assert entry.name.startswith(f"{entry.net}-")
    assert entry.layout in {layout.name for layout in NETS[entry.net].layouts}
    assert entry.url.startswith("https://")
    assert entry.licence
    assert entry.about
    algorithm, _, digits = entry.digest.partition(":")
    if algorithm == "sha256":
        assert re.fullmatch("[0-9a-f]{8,64}", digits)
    else:
        assert algorithm == "md5"
        assert re.fullmatch("[0-9a-f]{32}", digits)
    in_name = re.search(r"-([0-9a-f]{8})\.pth$", entry.url)
    if in_name:
        assert digits.startswith(in_name[1])
    if "resize_to" in entry.image:
        assert entry.image["resize_to"] >= 224
    # The size must be that of the layout's tensors, plus at most a few percent of names.
    layout = next(layout for layout in NETS[entry.net].layouts if layout.name == entry.layout)
    with torch.device("meta"):
        net = layout.build(None if layout.head is None else 1000)
    mib = sum(value.numel() * value.element_size() for value in net.state_dict().values()) / 2**20
    assert mib <= entry.size_mib <= mib * 1.05 + 0.15


def test_short_names() -> None:
    assert find("torchvision-v2", "mobilenet_v2") is CATALOG["mobilenet_v2-torchvision-v2"]
    assert find("vgg16-keras", "vgg16") is CATALOG["vgg16-keras"]
    assert find("keras", "alexnet") is None


@pytest.mark.needs_data
def test_the_real_squeezenet_file_is_the_published_one(data_dir: Path) -> None:
    file = data_dir / "squeezenet_v1.1_keras" / "squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"
    entry = CATALOG["squeezenet1_1-keras-notop"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert published_as(file, "squeezenet1_1", sha256) is entry
    assert published_as(file, "vgg16", sha256) is None
    assert round(file.stat().st_size / 2**20, 3) == entry.size_mib


def test_a_record_that_is_damaged_only_costs_a_download(server: Server, tmp_path: Path) -> None:
    path = download(server.url, cache=tmp_path, progress=False)
    record = path.with_name(path.name + ".json")
    assert json.loads(record.read_text())["digest"] == f"sha256:{SHA256}"
    record.write_text("{")
    assert download(server.url, cache=tmp_path, progress=False) == path
    assert len(server.requests) == 2
