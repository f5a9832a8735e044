"""FFHQ and AFHQv2 at 64x64 pixels, which cannot be downloaded, where EDM's tool leaves them."""

from dataclasses import dataclass
from pathlib import Path

from cedm_ray.data.edm_zip import EdmZip
from cedm_ray.data.folder import FolderSource
from cedm_ray.errors import UserError

RESOLUTION = 64


@dataclass(frozen=True)
class EdmDataset:
    """Names under which a dataset may lie in the data folder, and where it comes from."""

    name: str
    archive: str
    folders: tuple[str, ...]
    page: str


FFHQ64 = EdmDataset("ffhq64", "ffhq-64x64.zip", ("ffhq64", "ffhq-64x64"), "https://github.com/NVlabs/ffhq-dataset")
AFHQ64 = EdmDataset("afhq64", "afhqv2-64x64.zip", ("afhq64", "afhqv2-64x64"), "https://github.com/clovaai/stargan-v2")


def open_edm_dataset(dataset: EdmDataset, data_dir: Path, *, folder_labels: bool = False) -> EdmZip | FolderSource:
    """The images of a dataset from its archive in ``data_dir``, or else from a folder of that name.

    Args:
        dataset: ``FFHQ64`` or ``AFHQ64``.
        data_dir: Folder that holds the archive or the folder.
        folder_labels: Whether sub-folders are classes; of an archive, whether it must have labels.

    Raises:
        UserError: If neither is there, with the way to get it, or if it cannot be read.
    """
    archive = data_dir / dataset.archive
    if archive.is_file():
        return EdmZip(archive, RESOLUTION, need_labels=folder_labels, name=dataset.name)
    for folder in dataset.folders:
        if (data_dir / folder).is_dir():
            return FolderSource(data_dir / folder, RESOLUTION, folder_labels=folder_labels, name=dataset.name)
    raise UserError(
        f"{dataset.name} is not in {data_dir}, and it cannot be downloaded by itself: get the images from "
        f"{dataset.page}, make {dataset.archive} of them with EDM's dataset_tool.py (--resolution=64x64), and put it "
        f"or a folder {dataset.folders[0]} of images there, or name the folder that has one of them with --data-dir"
    )
