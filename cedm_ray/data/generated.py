"""Generated images, which are to be scored as they are: none is resized or cropped on the way.

A folder's are made grey or colour as the real images are; a ZIP must hold such ones.
"""

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
        channels: 3 to read images as colour, 1 to read them as grey.
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
        like: The real images, whose resolution they must have; in a ZIP also their channels.

    Raises:
        UserError: If there are none, or those of a ZIP have another resolution or other channels; images of a folder
            are looked at when they are read.
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
