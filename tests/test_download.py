"""Downloads are the bytes they should be; archives stay inside their folder."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import io
import os
import random
import shutil
import stat
import struct
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jlstm import data

BODY = b"weights" * 1000
HASH = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    url: str
    requests: list[str]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.requests.append(self.path)
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
            return
        self.send_response(404 if kind == "none" else 200)
        length = {"cut": len(BODY) + 1, "endless": 1 << 40}.get(kind, len(BODY))
        if kind != "silent":
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("JLSTM_OFFLINE", raising=False)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Downloads.


def test_fetch_downloads_once(server, tmp_path):
    path = tmp_path / "deep" / "file"
    for _ in range(2):
        found = data.fetch(f"{server.url}/file", sha256=HASH.upper(), path=path)
        assert found == path
        assert path.read_bytes() == BODY
    assert server.requests == ["/file"]
    assert left(tmp_path) == ["deep", "deep/file"]


def test_fetch_takes_what_is_there_without_network(monkeypatch, tmp_path):
    monkeypatch.setenv("JLSTM_OFFLINE", "1")
    (tmp_path / "file").write_bytes(BODY)
    url = "https://nowhere.invalid/file"
    assert data.fetch(url, sha256=HASH, path=tmp_path / "file").read_bytes() == BODY


def test_fetch_leaves_another_file_alone(server, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    mine = hashlib.sha256(b"mine").hexdigest()
    with pytest.raises(ValueError, match=rf"{mine} \(4 bytes\), expected {HASH}"):
        data.fetch(f"{server.url}/file", sha256=HASH, path=tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert not server.requests


def test_fetch_refuses_another_hash(server, tmp_path):
    other = "0" * 64
    with pytest.raises(ValueError, match=rf"{HASH} \(7000 bytes\), expected {other}"):
        data.fetch(f"{server.url}/file", sha256=other, path=tmp_path / "file")
    assert left(tmp_path) == []


@pytest.mark.parametrize("sha256", ["", HASH[1:], HASH + "0", "x" * 64, HASH + "\n"])
def test_fetch_wants_a_whole_hash(tmp_path, sha256):
    with pytest.raises(ValueError, match="64 hex digits"):
        data.fetch("https://nowhere.invalid/", sha256=sha256, path=tmp_path / "file")


@pytest.mark.parametrize("kind", ["file", "silent", "endless"])
def test_fetch_stops_at_max_bytes(server, tmp_path, kind):
    for limit in (6999, 10):
        with pytest.raises(ValueError, match=f"more than max_bytes={limit}"):
            data.fetch(
                f"{server.url}/{kind}",
                sha256=HASH,
                path=tmp_path / "file",
                max_bytes=limit,
            )
    assert left(tmp_path) == []


def test_fetch_takes_exactly_max_bytes_of_unknown_length(server, tmp_path):
    data.fetch(
        f"{server.url}/silent", sha256=HASH, path=tmp_path / "file", max_bytes=7000
    )
    assert left(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [("cut", "got 7000 of 7001 bytes"), ("none", "404")],
)
def test_fetch_refuses_what_is_no_whole_answer(server, tmp_path, kind, message):
    with pytest.raises(OSError, match=message) as caught:
        data.fetch(f"{server.url}/{kind}", sha256=HASH, path=tmp_path / "file")
    assert f"put the file with SHA-256 {HASH} at" in str(caught.value)
    assert left(tmp_path) == []


def test_fetch_offline_says_where_the_file_belongs(monkeypatch, server, tmp_path):
    monkeypatch.setenv("JLSTM_OFFLINE", "1")
    url, path = f"{server.url}/file", tmp_path / "file"
    with pytest.raises(OSError, match="JLSTM_OFFLINE") as caught:
        data.fetch(url, sha256=HASH, path=path)
    assert all(part in str(caught.value) for part in (url, str(path), HASH))
    assert not server.requests
    assert left(tmp_path) == []


def test_fetch_of_a_silent_server_ends(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:  # not serving
        url = f"http://127.0.0.1:{server.server_port}/file"
        with pytest.raises(OSError, match="timed out"):
            data.fetch(url, sha256=HASH, path=tmp_path / "file", timeout=0.05)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://example.invalid/file",
        "http://127.0.0.1@example.invalid/file",
        "http://localhost.example.invalid/file",
        "ftp://127.0.0.1/file",
        "data:,abc",
        "file://example.invalid/file",
        "https:///file",
        "/etc/passwd",
        "",
    ],
)
def test_fetch_refuses_other_urls(server, tmp_path, url):
    with pytest.raises(ValueError, match="URL must be https://"):
        data.fetch(url, sha256=HASH, path=tmp_path / "file")
    if not url.partition("/")[0]:
        return  # an address on the same server
    # urllib itself refuses redirects to some of them, with an HTTPError.
    with pytest.raises((ValueError, OSError), match=r"after a redirect|not allowed"):
        data.fetch(f"{server.url}/to/{url}", sha256=HASH, path=tmp_path / "file")
    assert left(tmp_path) == []


def test_fetch_refuses_redirects_to_files(server, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(BODY)
    with pytest.raises(OSError, match="not allowed"):
        data.fetch(
            f"{server.url}/to/{source.as_uri()}", sha256=HASH, path=tmp_path / "file"
        )
    assert left(tmp_path) == ["source"]


def test_fetch_follows_redirects_and_reads_files(server, tmp_path):
    url = f"{server.url}/to/{server.url}/file"
    first = data.fetch(url, sha256=HASH, path=tmp_path / "first")
    assert server.requests[1:] == ["/file"]
    data.fetch(first.as_uri(), sha256=HASH, path=tmp_path / "second")
    assert left(tmp_path) == ["first", "second"]


def test_fetch_does_not_leave_https(monkeypatch):
    from urllib.request import Request

    from jlstm.data.download import _Redirects

    request, body = Request("https://example.invalid/a"), io.BytesIO()
    for url in ("http://127.0.0.1/a", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="after a redirect from https://example"):
            _Redirects().redirect_request(request, body, 302, "", {}, url)


# Archives.

FILES = {"a.txt": b"abc", "deep/er/b.bin": bytes(3000), "deep/empty": b"", "é": b"1"}
COMPRESSIONS = ["", "gz", "bz2", "xz"]


def make_zip(*members: tuple[Any, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with (
        warnings.catch_warnings(action="ignore"),  # of names that occur twice
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, **options) as file,
    ):
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def make_tar(*members: tuple[Any, bytes], compression: str = "") -> bytes:
    buffer = io.BytesIO()
    mode: Any = f"w:{compression}"
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.GNU_FORMAT) as file:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            if info.isreg():
                info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def refuse(tmp_path: Path, content: bytes, message: str, **limits: Any) -> None:
    """Extracts into a folder in which nothing may be left, beside or inside."""
    archive, room = tmp_path / "archive", tmp_path / "room"
    archive.write_bytes(content)
    room.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message) as caught:
        data.extract(archive, room / "folder", **limits)
    assert str(caught.value).startswith(f"extract: {archive}")
    assert len(str(caught.value).splitlines()) == 1
    assert left(tmp_path) == ["archive", "room"]


@pytest.mark.parametrize("compression", ["zip", *COMPRESSIONS])
def test_extract_unpacks_every_kind(tmp_path, compression):
    if compression == "zip":
        content = make_zip(("deep/", b""), *FILES.items())
    else:
        folder = tarfile.TarInfo("./deep")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o7777
        root = tarfile.TarInfo("./")
        root.type, root.mode = tarfile.DIRTYPE, 0
        content = make_tar(
            (root, b""), (folder, b""), *FILES.items(), compression=compression
        )
    (tmp_path / "archive.dat").write_bytes(content)
    folder = data.extract(tmp_path / "archive.dat", tmp_path / "in" / "folder")
    assert folder == tmp_path / "in" / "folder"
    files = {p for p in folder.rglob("*") if p.is_file()}
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in files} == FILES
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o644 if path.is_file() else 0o755)
    assert left(tmp_path / "in")[0] == "folder"


@pytest.fixture(params=[0, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_extract_ignores_modes(tmp_path):
    info = zipfile.ZipInfo("d/run")
    info.external_attr = (stat.S_IFREG | 0o6777) << 16
    other = tarfile.TarInfo("d/run")
    other.mode, other.uid = 0o6777, 0
    for name, content in (("z", make_zip((info, b""))), ("t", make_tar((other, b"")))):
        (tmp_path / name).write_bytes(content)
        folder = data.extract(tmp_path / name, tmp_path / f"{name}.d")
        paths = (folder, folder / "d", folder / "d" / "run")
        modes = [stat.S_IMODE(path.stat().st_mode) for path in paths]
        assert modes == [0o755, 0o755, 0o644]


def test_extract_fills_an_empty_folder_only(tmp_path):
    (tmp_path / "a").write_bytes(make_zip(("x", b"1")))
    (tmp_path / "folder").mkdir()
    data.extract(tmp_path / "a", tmp_path / "folder")
    with pytest.raises(ValueError, match="exists already"):
        data.extract(tmp_path / "a", tmp_path / "folder")
    with pytest.raises(ValueError, match="exists already"):
        data.extract(tmp_path / "a", tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="extract: no file at"):
        data.extract(tmp_path / "none", tmp_path / "other")
    assert left(tmp_path) == ["a", "folder", "folder/x"]


def test_extract_takes_a_tar_that_ends_with_a_zip_for_a_tar(tmp_path):
    (tmp_path / "a").write_bytes(make_tar(("x.zip", make_zip(("inner", b"1")))))
    assert left(data.extract(tmp_path / "a", tmp_path / "folder")) == ["x.zip"]


NAMES = [
    ("/etc/evil", "leads out"),
    ("//host/evil", "leads out"),
    ("../evil", "leads out"),
    ("a/../../evil", "leads out"),
    ("a/..", "leads out"),
    ("C:/evil", "leads out"),
    ("c:evil", "leads out"),
    ("a/c:/evil", "leads out"),
    ("..\\evil", "not a valid file name"),
    ("a\\evil", "not a valid file name"),
    ("\\\\host\\share\\evil", "leads out"),
    (".", "not a valid file name"),
    ("d/" * 65 + "evil", "more than 64 folders"),
]


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(("name", "message"), NAMES)
def test_extract_refuses_names_that_lead_out(tmp_path, make, name, message):
    refuse(tmp_path, make(("first", b"1"), (name, b"1")), message)


def test_extract_refuses_folders_that_lead_out(tmp_path):
    refuse(tmp_path, make_zip(("../evil/", b"")), "leads out")
    info = tarfile.TarInfo("../evil")
    info.type = tarfile.DIRTYPE
    refuse(tmp_path, make_tar((info, b"")), "leads out")


def test_extract_refuses_a_name_cut_by_a_nul(tmp_path):
    content = make_zip(("aXb", b"1")).replace(b"aXb", b"a\0b")
    refuse(tmp_path, content, "not a valid file name")


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a", "a"), "'a' occurs twice"),
        (("a", "./a"), "'./a' occurs twice"),
        (("a", "A"), "'A' clashes with 'a'"),
        (("straße", "STRASSE"), "clashes"),
        (("d/a", "D/b"), "'D/b' clashes with 'd'"),
        (("a", "a/b"), "'a/b' clashes with 'a'"),
        (("a/b", "a"), "'a' clashes with 'a'"),
    ],
)
def test_extract_refuses_names_that_clash(tmp_path, make, names, message):
    refuse(tmp_path, make(*((name, b"1") for name in names)), message)


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        b"V",  # unknown
    ],
)
def test_extract_refuses_links_and_devices_in_tars(tmp_path, kind):
    (tmp_path / "archive").write_bytes(b"outside")
    info = tarfile.TarInfo("evil")
    info.type, info.linkname = kind, "first"
    refuse(tmp_path, make_tar(("first", b"1"), (info, b"")), "'evil' is a link")


def test_extract_refuses_to_write_through_a_link(tmp_path):
    outside = tmp_path / "room" / "outside"
    info = tarfile.TarInfo("door")
    info.type, info.linkname = tarfile.SYMTYPE, str(outside)
    refuse(tmp_path, make_tar((info, b""), ("door/evil", b"1")), "'door' is a link")


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_extract_refuses_links_and_devices_in_zips(tmp_path, kind):
    info = zipfile.ZipInfo("evil")
    info.external_attr = (kind | 0o777) << 16
    refuse(tmp_path, make_zip((info, b"/etc/passwd")), "'evil' is a link")


def test_extract_refuses_sparse_files(tmp_path):
    info = tarfile.TarInfo("evil")
    info.type = tarfile.GNUTYPE_SPARSE
    content = bytearray(make_tar((info, b"")))
    content[483:495] = b"%011o\0" % (1 << 30)  # the size that it claims
    content[148:156] = b"%06o\0 " % tarfile.calc_chksums(content[:512])[0]  # type: ignore[attr-defined]
    refuse(tmp_path, bytes(content), "'evil' is a link, a device or a sparse file")


def test_extract_refuses_encrypted_members(tmp_path):
    content = bytearray(make_zip(("evil", b"1")))
    content[content.index(b"PK\1\2") + 8] |= 1
    content[6] |= 1
    refuse(tmp_path, bytes(content), "'evil' is encrypted")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_extract_refuses_methods_that_unpack_without_bound(tmp_path, method):
    info = zipfile.ZipInfo("evil")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(info, b"1", method)
    refuse(tmp_path, buffer.getvalue(), "a method other than deflate")


# Limits.


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_extract_counts_files_and_folders(tmp_path, make):
    content = make(("d/a", b"1"), ("d/b", b"1"), ("e/c", b"1"))
    refuse(tmp_path, content, "max_files=4", max_files=4)
    data.extract(tmp_path / "archive", tmp_path / "folder", max_files=5)


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_extract_counts_bytes_of_all_files(tmp_path, make):
    content = make(("a", bytes(3000)), ("b", bytes(3000)))
    refuse(tmp_path, content, "'b' exceeds max_bytes=5999", max_bytes=5999)
    data.extract(tmp_path / "archive", tmp_path / "folder", max_bytes=6000)


ZEROS = bytes(100_000_000)


def bomb(kind: str) -> bytes:
    if kind == "zip":
        return make_zip(("a", ZEROS), compresslevel=1)
    head = tarfile.TarInfo("a")
    head.size = len(ZEROS)
    return gzip.compress(head.tobuf() + ZEROS + bytes(10_240), 1, mtime=0)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_extract_defuses_bombs(tmp_path, monkeypatch, kind):
    content, most = bomb(kind), 0
    assert len(content) < 1_000_000
    write = Path.chmod  # called once a file is written

    def watch(path: Path, mode: int, **options: Any) -> None:
        nonlocal most
        most = max(most, path.stat().st_size if path.is_file() else 0)
        write(path, mode, **options)

    monkeypatch.setattr(Path, "chmod", watch)
    refuse(tmp_path, content, "max_bytes=1000", max_bytes=1000)
    refuse(tmp_path, content, "max_ratio=200")
    assert most == 0


def test_extract_allows_a_ratio_up_to_a_mebibyte_and_where_it_is_asked(tmp_path):
    (tmp_path / "small").write_bytes(make_zip(("a", bytes(1 << 20))))
    data.extract(tmp_path / "small", tmp_path / "1")
    (tmp_path / "large").write_bytes(make_zip(("a", bytes(3 << 20))))
    with pytest.raises(ValueError, match="max_ratio"):
        data.extract(tmp_path / "large", tmp_path / "2")
    data.extract(tmp_path / "large", tmp_path / "2", max_ratio=2000)


def test_extract_looks_at_the_ratio_of_each_member(tmp_path):
    noise = random.Random(0).randbytes(1 << 16)
    content = make_zip(("noise", noise), ("evil", bytes(3 << 20)))
    refuse(tmp_path, content, "'evil' exceeds max_ratio")


def test_extract_looks_at_the_ratio_of_all_members(tmp_path):
    content = make_tar(*((str(n), bytes(1 << 19)) for n in range(8)), compression="gz")
    refuse(tmp_path, content, "'2' exceeds max_ratio")
    data.extract(tmp_path / "archive", tmp_path / "folder", max_ratio=2000)


def test_extract_does_not_believe_the_packed_size(tmp_path):
    content = bytearray(make_zip(("evil", bytes(3 << 20))))
    place = content.index(b"PK\1\2")
    content[place + 20 : place + 24] = struct.pack("<I", 1 << 30)
    refuse(tmp_path, bytes(content), "not a valid archive: cut off")


@pytest.mark.parametrize("claim", [1, 100_000])
def test_extract_does_not_believe_the_unpacked_size(tmp_path, claim):
    content = bytearray(make_zip(("evil", bytes(50_000))))
    place = content.index(b"PK\1\2")
    content[place + 24 : place + 28] = struct.pack("<I", claim)
    refuse(tmp_path, bytes(content), "not a valid archive")


def test_extract_refuses_headers_of_any_size(tmp_path):
    head = tarfile.TarInfo("././@LongLink")
    head.type = tarfile.GNUTYPE_LONGNAME
    for size, message in (
        (1 << 33, "a header of 8589934592"),
        (-1024, "a header of -"),
    ):
        head.size = size
        content = head.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)
        refuse(tmp_path, gzip.compress(content), message)
        refuse(tmp_path, content, message)


def test_extract_counts_what_follows_the_end(tmp_path):
    content = make_tar(("a", b"1")) + bytes(1 << 22)
    limits = {"max_bytes": 1000, "max_files": 9}
    refuse(tmp_path, gzip.compress(content), "from max_bytes and", **limits)


# Damage.


@pytest.mark.parametrize("compression", ["zip", *COMPRESSIONS])
def test_extract_refuses_cut_archives(tmp_path, compression):
    noise = random.Random(0).randbytes(20_000)
    members = [("a", noise), ("b", noise), ("c", b"")]
    if compression == "zip":
        content = make_zip(*members)
    else:
        content = make_tar(*members, compression=compression)
    # A plain tar may lose the blocks that pad it, but not the first.
    end = 3 * 512 + 2 * 20_480 + 512 if compression == "" else len(content)
    for size in (0, 1, 100, 511, 512, 700, 20_992, 21_100, end - 512, end - 1):
        refuse(
            tmp_path,
            content[: min(size, end - 1)],
            "(is not a valid archive|is cut)",
        )
    (tmp_path / "archive").write_bytes(content[:end])
    data.extract(tmp_path / "archive", tmp_path / "folder")


def test_extract_refuses_a_broken_header_amid_a_tar(tmp_path):
    content = bytearray(make_tar(("a", b"1"), ("b", b"1"), ("c", b"1")))
    content[1024 + 3] ^= 1
    refuse(tmp_path, bytes(content), "neither a member nor the end at byte 1024")


@pytest.mark.parametrize("place", [-1, -5])
def test_extract_compares_checksums_to_the_end(tmp_path, place):
    content = bytearray(make_tar(("a", b"1"), compression="gz"))
    content[place] ^= 1
    refuse(tmp_path, bytes(content), "not a valid archive")
    content = bytearray(make_zip(("a", b"abc"), ("b", b"abc")))
    content[content.index(b"PK\1\2") + 16] ^= 1
    refuse(tmp_path, bytes(content), "not a valid archive")


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8btext", b"BZhtext", b"PK"])
def test_extract_refuses_other_files(tmp_path, content):
    refuse(tmp_path, content, "(neither zip nor tar|not a valid archive)")


@pytest.mark.parametrize("compression", ["zip", *COMPRESSIONS])
def test_extract_of_random_damage_fails_in_one_way(tmp_path, compression):
    rng = random.Random(1)
    members = [("a", b"abc" * 99), ("d/" + "n" * 120, b"1"), ("c", b"")]
    if compression == "zip":
        content = make_zip(*members)
    else:
        content = make_tar(*members, compression=compression)
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(len(damaged), 4000))] = rng.randrange(256)
        (tmp_path / "a").write_bytes(damaged)
        with contextlib.suppress(ValueError):  # and no other error
            shutil.rmtree(data.extract(tmp_path / "a", tmp_path / "folder"))
        assert left(tmp_path) == ["a"]


def test_extract_leaves_nothing_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(make_zip(("d/x", b"1")))
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        data.extract(tmp_path / "a", tmp_path / "folder")
    assert left(tmp_path) == ["a"]
