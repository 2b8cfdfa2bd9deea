"""Layouts of archives: the folders above the classes, and files that are no images of the split."""

import io
import tarfile
import zipfile

import pytest
from PIL import Image

from tests.data.damage import streamed_zip
from tests.data.forms import CLASSES, add, photos
from vca.data import load_dataset
from vca.data.config import DataConfig
from vca.data.scan import by_class_folder
from vca.runtime.errors import ConfigError


def load(root, train=True, **options):
    return load_dataset(DataConfig("imagefolder", str(root), **{"num_classes": len(CLASSES)} | options), train)


def contents(images):
    """Return the names, labels and contents of all images."""
    return [(images.index.name(k), int(images.labels[k]), images.index.read(k)) for k in range(len(images))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos") / "data", per_class=2)


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def write_tar(path, files, **options):
    with tarfile.open(path, "w", **options) as archive:
        for name, content in files.items():
            add(archive, name, content)


def files_below(folders, prefix=""):
    """Return `{prefix + split/class/file: content}`."""
    return {f"{prefix}{path.relative_to(folders)}": path.read_bytes() for path in sorted(folders.glob("*/*/*"))}


def plain(folders):
    return files_below(folders)


def imagenette(folders):
    return files_below(folders, "imagenette2/") | {"imagenette2/noisy_imagenette.csv": b"path,label\n"}


def dot_slash(folders):
    return files_below(folders, "./")


def macos(folders):
    """Return what macOS's Finder and its tar write beside the files."""
    hidden = {f"__MACOSX/{name}": b"no image" for name in files_below(folders)}
    beside = {"/._".join(name.rsplit("/", 1)): b"no image" for name in files_below(folders)}
    return files_below(folders) | hidden | beside | {"train/.DS_Store": b"", f"train/{CLASSES[0]}/.DS_Store": b""}


def readme(folders):
    """Return class folders with images and texts beside them."""
    more = {"preview.png": b"no image", "README.md": b"", "train/preview.jpg": b"no image", "docs/a/figure.png": b"no"}
    return files_below(folders) | more


LAYOUTS = {layout.__name__: layout for layout in (plain, imagenette, dot_slash, macos, readme)}


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_class_folders(folders, tmp_path, layout, write):
    """One archive contains both splits."""
    path = tmp_path / f"data.{write.__name__[-3:]}"
    write(path, LAYOUTS[layout](folders))
    for train in (True, False):
        images = load(path, train)
        assert contents(images) == contents(load(folders, train))
        assert images.classes == list(CLASSES)


def test_kaggle_zip_equals_class_folders(folders, tmp_path):
    """`imagenet-object-localization-challenge.zip`: class folders for training, flat validation images, annotations."""
    files, base, lines = {}, "ILSVRC/Data/CLS-LOC", ["ImageId,PredictionString"]
    for name, content in files_below(folders).items():
        split, wnid, _ = name.split("/")
        image = f"{base}/val/ILSVRC2012_val_{len(lines):08d}.JPEG" if split == "val" else f"{base}/{name}"
        files[image] = content
        files[image.replace("Data", "Annotations").replace(".JPEG", ".xml")] = b"<annotation/>"
        if split == "val":
            lines.append(f"ILSVRC2012_val_{len(lines):08d},{wnid} 1 2 3 4 ")
    files[f"{base}/test/ILSVRC2012_test_00000001.JPEG"] = b"no image"
    write_zip(tmp_path / "kaggle.zip", files)
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    given = {"labels": str(tmp_path / "LOC_val_solution.csv")}
    assert contents(load(tmp_path / "kaggle.zip", True, **given)) == contents(load(folders, True))
    images, expected = load(tmp_path / "kaggle.zip", False, **given), load(folders, False)
    assert [one[1:] for one in contents(images)] == [one[1:] for one in contents(expected)]
    assert images.classes == list(CLASSES)


def test_zip_written_to_pipe_equals_class_folders(folders, tmp_path):
    streamed_zip(lambda content: content)(folders / "train", tmp_path)
    assert contents(load(tmp_path)) == contents(load(folders))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tar_long_names_kept(folders, tmp_path, form):
    deep = "/".join(["a folder with a long name, é"] * 8)
    files = {f"train/{name}/{deep}/{name}.JPEG": b"" for name in CLASSES}
    write_tar(tmp_path / "train.tar", files, format=form)
    images = load(tmp_path)
    assert [images.index.name(number) for number in range(3)] == [f"{name}/{deep}/{name}.JPEG" for name in CLASSES]


def test_nested_folders_uppercase_and_hidden_equal_class_folders(tmp_path):
    """The order is that of the class folders, also for files in folders of a class."""
    root, files = tmp_path / "data", {}
    for number, name in enumerate(["b.JPG", "a.Png", "z/1.jpeg", "z/y/2.TIFF", "A/3.WebP", ".hidden.png", "x.txt"]):
        for split in ("train", "val"):
            for label in CLASSES:
                file = root / split / label / name
                file.parent.mkdir(parents=True, exist_ok=True)
                content = io.BytesIO()
                Image.new("RGB", (4 + number, 4)).save(content, "PNG")
                file.write_bytes(content.getvalue())
                files[str(file.relative_to(root))] = content.getvalue()
    write_zip(tmp_path / "data.zip", files)
    write_tar(tmp_path / "data.tar", files)
    expected = contents(load(root))
    assert len(expected) == 6 * len(CLASSES)
    assert contents(load(tmp_path / "data.zip")) == expected
    assert contents(load(tmp_path / "data.tar")) == expected


def test_class_folders_without_macos_files(folders, tmp_path):
    for name, content in macos(folders).items():
        if "__MACOSX" not in name:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    assert contents(load(tmp_path)) == contents(load(folders))


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_archive_of_other_split_refused(folders, tmp_path, write):
    """An archive with val/ alone has no training images, also if it is named as the training split."""
    path = tmp_path / f"data.{write.__name__[-3:]}"
    write(path, {name: content for name, content in files_below(folders).items() if name.startswith("val/")})
    assert len(load(path, train=False)) == 6
    with pytest.raises(ConfigError, match=f"{path}: no images of train found"):
        load(path, train=True)


def test_by_class_folder_class_called_train():
    """A class called train is no folder of a split."""
    names = [f"data/{name}/1.jpg" for name in ("bus", "train", "tram")]
    assert by_class_folder(names, "train") == {
        f"data/{name}/1.jpg": (f"{name}/1.jpg", name) for name in ("bus", "train", "tram")
    }
