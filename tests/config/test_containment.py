"""Names, links and special files that lead out of a folder are refused; the message names the file and its target."""

import os
import shutil
from pathlib import Path

import pytest

from llmctl.config import containment
from llmctl.config.errors import RequestError
from llmctl.convert import hf_folder, safetensors
from llmctl.data import paths
from llmctl.model.generate import chat


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "file").write_text("inside")
    return tmp_path / "folder"


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "below/../../secret", "", "..", "a\0b"])
def test_names_that_lead_out_are_refused(folder, name):
    with pytest.raises(RequestError, match="is not inside it"):
        containment.within(folder, name)


@pytest.mark.parametrize("name", ["file", "below/new", "absent", "below"])
def test_names_inside_are_paths(folder, name):
    assert containment.within(folder, name) == folder / name


def test_links_that_lead_out_are_refused_wherever_they_are(folder, tmp_path):
    (folder / "below" / "link").symlink_to(tmp_path / "secret")
    said = rf"below/link: is a link to {tmp_path}/secret, outside {folder}"
    for refused in (lambda: containment.within(folder, "below/link"), lambda: containment.check(folder)):
        with pytest.raises(RequestError, match=said):
            refused()
    with pytest.raises(RequestError, match=said):
        containment.copy(folder, tmp_path / "copied")
    assert not (tmp_path / "copied").exists()


def test_a_folder_of_the_path_may_not_be_a_link_out(folder, tmp_path):
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(RequestError, match=r"linked/secret: is a link to .*/secret, outside"):
        containment.within(folder, "linked/secret")
    with pytest.raises(RequestError, match="linked: is a link to the folder"):
        containment.check(folder)


def test_links_inside_are_copied_as_files(folder, tmp_path):
    (folder / "below" / "link").symlink_to("../file")
    containment.copy(folder, tmp_path / "copied")
    copied = tmp_path / "copied" / "below" / "link"
    assert copied.read_text() == "inside" and not copied.is_symlink()


def test_links_in_a_circle_end(folder):
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    containment.check(folder)  # readers find no file there
    assert not containment.within(folder, "a").is_file()


def test_a_snapshot_of_hugging_faces_cache_may_link_to_its_blobs(tmp_path):
    model = tmp_path / "models--us--it"
    snapshot = model / "snapshots" / "1234"
    (model / "blobs").mkdir(parents=True)
    (snapshot / "1_Pooling").mkdir(parents=True)
    (model / "blobs" / "abcd").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/abcd")
    (tmp_path / "link").symlink_to(snapshot)  # the user may name the snapshot by a link
    for named in (snapshot, tmp_path / "link"):
        containment.check(named)
        assert containment.within(named, "config.json").read_text() == "{}"
    (tmp_path / "secret").write_text("outside")
    (model / "blobs" / "efgh").symlink_to(tmp_path / "secret")
    (snapshot / "vocab.txt").symlink_to("../../blobs/efgh")
    with pytest.raises(RequestError, match=r"vocab.txt: is a link to .*/secret, outside"):
        containment.check(snapshot)
    (snapshot / "vocab.txt").unlink()
    shutil.move(model / "blobs", tmp_path / "elsewhere")
    (model / "blobs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RequestError, match="outside"):
        containment.check(snapshot)


def test_pipes_and_devices_are_refused(folder):
    os.mkfifo(folder / "pipe")
    with pytest.raises(RequestError, match="pipe: is a pipe, and llmctl reads regular files"):
        containment.check(folder)
    with pytest.raises(RequestError, match="/dev/zero: is a device"):
        containment.regular("/dev/zero")


def test_scratch_files_are_not_written_through_links(folder, tmp_path):
    (tmp_path / "work").symlink_to(folder)
    with pytest.raises(RequestError, match=f"work: is a link to {folder}"):
        containment.own(tmp_path / "work")
    assert containment.own(folder) == folder


def test_readers_refuse_what_never_ends():
    for read, refused in (
        (chat.read_conversation, Path("/dev/zero")),
        (hf_folder.read_json, Path("/dev/zero")),
        (safetensors.read_file, Path("/dev/zero")),
        (paths.resolve, "/dev/zero"),
    ):
        with pytest.raises(RequestError, match="/dev/zero: is a device"):
            read(refused)
