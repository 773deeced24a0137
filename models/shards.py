"""Images packed into tar shards: DVC pays about a millisecond per file, so thousands of images become a few files.

    with ShardWriter(folder) as shards:
        shards.add("cond-1.image", image)
    ShardReader(folder)["cond-1.image"]      # PIL image

Members are PNG with fixed headers, so equal images in equal order give equal bytes and an equal digest.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import TracebackType

from PIL import Image

from models.errors import BadImage, UnknownVersion

SHARD_BYTES = 64 * 2**20  # ours: 64 MB a shard


class ShardWriter:
    """Writes `images-00000.tar`, `images-00001.tar`, ... into `folder`. A context manager."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES):
        self.folder = folder
        self.shard_bytes = shard_bytes
        self._tar: tarfile.TarFile | None = None
        self._count = 0
        self._written = 0

    def add(self, key: str, image: Image.Image) -> None:
        """Store one image losslessly under `key`."""
        if self._tar is None or self._written >= self.shard_bytes:
            self._open_next()
        assert self._tar is not None
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        info = tarfile.TarInfo(f"{key}.png")
        info.size = buffer.tell()
        buffer.seek(0)
        self._tar.addfile(info, buffer)
        self._written += info.size

    def _open_next(self) -> None:
        self.close()
        self._tar = tarfile.open(self.folder / f"images-{self._count:05d}.tar", "w")  # noqa: SIM115 - closed by `close`
        self._count += 1
        self._written = 0

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class ShardReader:
    """Random access by key to every shard in `folder`. Raises BadImage for a shard that is cut or altered."""

    def __init__(self, folder: Path):
        self._members: dict[str, tuple[Path, int, int]] = {}
        for path in sorted(folder.glob("images-*.tar")):
            try:
                with tarfile.open(path) as tar:
                    for info in tar:
                        if not info.isreg():
                            raise BadImage(f"{info.name!r} in {path} is no file.", "Fetch the artifact again.")
                        self._members[info.name.removesuffix(".png")] = (path, info.offset_data, info.size)
            except (tarfile.TarError, OSError) as error:
                raise BadImage(f"{path} is not a readable shard: {error}.", "Fetch the artifact again.") from error
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return key in self._members

    def __getitem__(self, key: str) -> Image.Image:
        if key not in self._members:
            raise UnknownVersion(
                f"No image {key!r} in {self.folder}.", "The rows and the shards are of different versions; run the stage again."
            )
        path, offset, size = self._members[key]
        with path.open("rb") as file:
            file.seek(offset)
            payload = file.read(size)
        try:
            image = Image.open(io.BytesIO(payload))
            image.load()
        except OSError as error:
            raise BadImage(f"{key} in {path} does not decode: {error}.", "Fetch the artifact again.") from error
        return image
