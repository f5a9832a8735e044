"""Generated images, which are to be scored as they are: none is resized, cropped or recoloured on the way."""

from pathlib import Path

from PIL import Image

from cedm_ray.data.edm_zip import EdmZip
from cedm_ray.data.folder import FolderSource
from cedm_ray.data.images import WAY_OUT, BadImageError
from cedm_ray.data.sources import ImageSource
from cedm_ray.errors import UserError


class GeneratedFolder(FolderSource):
    """A folder of images that have the wanted resolution already.

    Args:
        root: The folder.
        resolution: Side that every image must have, in pixels.
        channels: 3, or 1 to read images as grey.
    """

    def __init__(self, root: Path, resolution: int, channels: int) -> None:
        super().__init__(root, resolution)
        self.channels = channels
        self.fingerprint = f"{self.fingerprint} as it is, {channels} channels"

    def _check(self, image: Image.Image, where: str) -> None:
        if image.size != (self.resolution, self.resolution):
            raise BadImageError(
                f"{where} has {image.width}x{image.height} pixels; {self.resolution}x{self.resolution} are due, as the "
                f"real images have: a resize would be scored too, so do it as the score is to see it, {WAY_OUT}"
            )


def open_generated(path: str, like: ImageSource) -> ImageSource:
    """Generated images from a folder or a ZIP.

    Args:
        path: Where they are.
        like: The real images, whose resolution and channels they must have.

    Raises:
        UserError: If there are none, or one has another size.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return GeneratedFolder(place, like.resolution, like.channels)
    if not place.is_file() or place.suffix.lower() != ".zip":
        raise UserError(f"images {path!r} are no folder and no ZIP; give one with the generated images")
    source = EdmZip(place)
    if (source.resolution, source.channels) != (like.resolution, like.channels):
        raise UserError(
            f"images in {path} have {source.resolution} pixels and {source.channels} channels; {like.name} has "
            f"{like.resolution} and {like.channels}: write them as the score is to see them"
        )
    return source
