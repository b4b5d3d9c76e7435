"""Prepared data names files of its own folder only."""

import numpy as np
import pytest
from etils import epath

from llmctl.config.errors import RequestError
from llmctl.data.pretraining.prepared import Part, Shard, Shards, read


@pytest.mark.parametrize("at", ["shard", "lengths"])
def test_files_outside_the_folder_are_not_read(tmp_path, at):
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "lengths.npy", np.zeros(0, np.int32))
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    for name, said in (("../secret", "names '../secret', which is not inside it"), ("link", "link: is a link to")):
        shard = Shard(file=name, documents=0, tokens=0, bytes=7, sha256="")
        part = Part(title="", weight=1, epochs=1, lengths="lengths.npy", shards=[shard] if at == "shard" else [])
        part = part if at == "shard" else part.model_copy(update={"lengths": name})
        with pytest.raises(RequestError, match=said):
            Shards(epath.Path(tmp_path / "data"), part, "<u2")


def test_the_description_is_no_link(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "data" / "prepared.json").symlink_to(tmp_path / "secret")
    with pytest.raises(RequestError, match=r"prepared.json: is a link to"):
        read(str(tmp_path / "data"))
