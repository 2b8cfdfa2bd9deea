"""Labels of images without class folders, and the order of the classes, from files of every kind."""

import io
import json
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io

from tests.data.forms import CLASSES, add, files_of, photos, table, write_webdataset
from vca.data import identify_files, load_dataset
from vca.data.classes import DEVKIT, GROUND_TRUTH, SYNSETS, read_class_file, read_label_file
from vca.data.config import DataConfig
from vca.runtime.errors import ConfigError

NAMES = ("tench", "crane", "crane bird")  # of CLASSES
SYNSET_WORDS = "n01440764 tench, Tinca tinca\nn02102040 crane\nn03888257 crane\n"


def load(root, train=False, /, **options):
    return load_dataset(DataConfig("imagefolder", str(root), **{"num_classes": len(CLASSES)} | options), train)


def labelled(images):
    """Return `{content: label}`, which is the same for all forms of the same images."""
    return {images.index.read(number): int(images.labels[number]) for number in range(len(images))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return photos(tmp_path_factory.mktemp("photos") / "data", per_class=3)


@pytest.fixture(scope="module")
def validation(folders):
    """Validation images as ILSVRC's, `[(name, class, content)]` in an order without regard to the class."""
    files = [files_of(folders / "val")[number] for number in np.random.default_rng(3).permutation(9)]
    return [(f"ILSVRC2012_val_{number:08d}", name, content) for number, (name, _, content) in enumerate(files, start=1)]


def write_val_tar(root, validation):
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for name, _, content in validation:
            add(archive, f"{name}.JPEG", content)


def write_flat_val(root, validation):
    (root / "val").mkdir(parents=True)
    for name, _, content in validation:
        (root / "val" / f"{name}.JPEG").write_bytes(content)


def devkit(validation):
    """Return the files of a development kit, whose ILSVRC2012_ID are not in the order of the WordNet ids."""
    ids = {CLASSES[0]: 3, CLASSES[1]: 1, CLASSES[2]: 2}
    synsets = np.array(
        [(ids[name], name, "words") for name in sorted(CLASSES, key=ids.get)],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)],
    )
    content = io.BytesIO()
    scipy.io.savemat(content, {"synsets": synsets[:, None]})
    truth = "".join(f"{ids[name]}\n" for _, name, _ in validation)
    return {GROUND_TRUTH: truth.encode(), SYNSETS: content.getvalue()}


def packed_devkit(root, validation):
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        for name, content in devkit(validation).items():
            add(archive, name, content)


def unpacked_devkit(root, validation):
    for name, content in devkit(validation).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


# Label files. kind -> line of an image
LINES = {
    "name wnid": "{name}.JPEG {wnid}",
    "stem wnid": "{name} {wnid}",
    "name integer": "{name}.JPEG {number}",
    "path, tab, integer": "val/{name}.JPEG\t{number}",
    "Kaggle": "{name},{wnid} 85 1 499 272 {wnid} 3 4 5 6 ",
}


def write_labels(root, validation, kind, leave_out=0):
    lines = [
        LINES[kind].format(name=name, wnid=wnid, number=CLASSES.index(wnid)) for name, wnid, _ in validation[leave_out:]
    ]
    header = ["ImageId,PredictionString"] if kind == "Kaggle" else []
    (root / "labels.txt").write_text("\n".join([*header, *lines]) + "\n")
    return {"labels": str(root / "labels.txt")}


def label_file(kind):
    return lambda root, validation: write_labels(root, validation, kind)


SOURCES = {"packed kit": packed_devkit, "unpacked kit": unpacked_devkit, **{kind: label_file(kind) for kind in LINES}}


def write_tar_of_folder(root, validation):
    """Write a tar of a folder of images."""
    with tarfile.open(root / "val.tar", "w") as archive:
        for name, _, content in validation:
            add(archive, f"ILSVRC2012_img_val/{name}.JPEG", content)


@pytest.mark.parametrize("write", [write_val_tar, write_flat_val, write_tar_of_folder])
@pytest.mark.parametrize("source", SOURCES)
def test_validation_labels_equal_class_folders(folders, validation, tmp_path, write, source):
    write(tmp_path, validation)
    options = SOURCES[source](tmp_path, validation) or {}
    images = load(tmp_path, **options)
    assert labelled(images) == labelled(load(folders))
    if "integer" not in source:
        assert images.classes == list(CLASSES)


def test_label_file_lacks_image_refused(validation, tmp_path):
    write_val_tar(tmp_path, validation)
    given = write_labels(tmp_path, validation, "name wnid", leave_out=2)
    name = f"{validation[0][0]}.JPEG"
    with pytest.raises(ConfigError, match=f"labels.txt has no label of {name} and 1 more; complete it"):
        load(tmp_path, **given)


# kind -> (content, message)
LABEL_FILES = {
    "ground truth alone": ("490\n361\n", "must have lines 'image class', got '490'"),
    "two classes": ("a.jpg cat\na.jpg dog\n", "a.jpg has two classes; remove one"),
}


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_label_file_invalid_refused(tmp_path, kind):
    content, message = LABEL_FILES[kind]
    path = tmp_path / "labels.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=f"data.labels={path}.*{message}"):
        read_label_file(path)


@pytest.mark.parametrize("damage", [lambda content: content[:200], lambda _: b"no kit", lambda _: None])
def test_label_file_unreadable_refused(validation, tmp_path, damage):
    packed_devkit(tmp_path, validation)
    path = tmp_path / f"{DEVKIT}.tar.gz"
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"data.labels={path} cannot be read: .") as refused:
        read_label_file(path)
    assert "\n" not in str(refused.value)


# Class files. kind -> content, for a parquet file with the class names `NAMES`
CLASS_FILES = {
    "tabs": "n01440764\ttench\nn02102040\tcrane\nn03888257\tcrane bird\n",
    "synset words": "n01440764 tench\nn02102040 crane\nn03888257 crane bird\n",
    "names": "tench\ncrane\ncrane bird\n",
}


def write_renamed(folder, out, names):
    """Write parquet whose labels are places in `names` (of `NAMES`), in a column with these class names."""
    rows = table(folder)
    labels = [names.index(NAMES[label]) for label in rows.column("label").to_pylist()]
    images = [{**image, "path": f"{number}.jpg"} for number, image in enumerate(rows.column("image").to_pylist())]
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    rows = rows.set_column(1, "label", [labels]).set_column(0, rows.schema.field("image"), [images])
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(rows.replace_schema_metadata(metadata), out)


@pytest.mark.parametrize("kind", CLASS_FILES)
def test_class_file_maps_other_order(folders, tmp_path, kind):
    """The labels are those of the class folders, although the file has another order."""
    write_renamed(folders / "train", tmp_path / "train.parquet", ("crane bird", "tench", "crane"))
    (tmp_path / "classes.txt").write_text(CLASS_FILES[kind])
    expected = labelled(load(folders, True))
    images = load(tmp_path, True, classes=str(tmp_path / "classes.txt"))
    assert labelled(images) == expected
    assert images.classes == list(NAMES if kind == "names" else CLASSES)
    assert labelled(load(tmp_path, True)) != expected


def test_class_file_duplicate_alias_left_out(tmp_path):
    """Two classes of ImageNet are called crane: neither is chosen by this name."""
    path = tmp_path / "synset_words.txt"
    path.write_text(SYNSET_WORDS)
    names = read_class_file(str(path))
    assert names == {**{wnid: wnid for wnid in CLASSES}, "tench, Tinca tinca": CLASSES[0]}


# kind -> (content, message); the data are class folders of CLASSES
WRONG_CLASS_FILES = {
    "a class is missing": ("n01440764\nn02102040\n", "train: class 'n03888257' is not in data.classes; add it"),
    "two are missing": ("n01440764\n", "train: class 'n02102040' and 1 more is not in data.classes; add it"),
    "a class without images": (
        "n01440764\nn02102040\nn03888257\nn04000000\n",
        "train: 1 classes have no image, such as n04000000; complete it",
    ),
    "two lines": ("n01440764\nn02102040\nn03888257\nn01440764\n", "'n01440764' is in two lines; remove one"),
    "two classes are one": (
        "n01440764\tn02102040\nn03888257\n",
        "'n01440764' and 'n02102040' are one class in data.classes, 'n01440764'; give each a line",
    ),
    "empty": ("\n", "is empty; write one class a line"),
}


@pytest.mark.parametrize("kind", WRONG_CLASS_FILES)
def test_class_file_wrong_refused(folders, tmp_path, kind):
    content, message = WRONG_CLASS_FILES[kind]
    path = tmp_path / "classes.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load(folders, True, classes=str(path), index=str(tmp_path / "index"))


def test_class_file_missing_refused(folders):
    with pytest.raises(ConfigError, match=r"data.classes=/nowhere cannot be read: .*No such file"):
        load(folders, classes="/nowhere")


def write_reordered_shards(folders, root):
    """Write shards whose labels are in another order than the WordNet ids in the names; return the order."""
    root.mkdir()
    order = (CLASSES[1], CLASSES[2], CLASSES[0])
    with tarfile.open(root / "train-000000.tar", "w") as archive:
        for name, file, content in files_of(folders / "train"):
            add(archive, file.replace(".JPEG", ".jpg"), content)
            add(archive, file.replace(".JPEG", ".cls"), b"%d" % order.index(name))


def test_order_contradicts_wordnet_refused_or_mapped(folders, tmp_path):
    root = tmp_path / "data"
    write_reordered_shards(folders, root)
    message = rf"not in the order of ImageNet's classes \(label 0 is {CLASSES[1]}\); set data.classes=FILE, one class a"
    with pytest.raises(ConfigError, match=message):
        load(root, True)
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    images = load(root, True, classes=str(tmp_path / "classes.txt"))
    assert images.classes == list(CLASSES)
    assert labelled(images) == labelled(load(folders, True))


def test_labels_with_one_wordnet_id_refused(folders, tmp_path):
    with tarfile.open(tmp_path / "train-000000.tar", "w") as archive:
        for number, (_, _, content) in enumerate(files_of(folders / "train")):
            add(archive, f"{CLASSES[0]}_{number}.jpg", content)
            add(archive, f"{CLASSES[0]}_{number}.cls", b"%d" % (number % 3))
    with pytest.raises(
        ConfigError, match=f"{CLASSES[0]}_1.jpg has label 1, but other images of {CLASSES[0]} have 0; correct"
    ):
        load(tmp_path, True)


def splits(root, **options):
    return {split: load(root, split == "train", **options) for split in ("train", "val")}


def test_splits_in_other_order_refused_or_mapped(folders, tmp_path):
    write_renamed(folders / "train", tmp_path / "train.parquet", NAMES)
    write_renamed(folders / "val", tmp_path / "val.parquet", ("crane", "tench", "crane bird"))
    message = r"data.train and data.val have different classes: label 0 is 'tench' and 'crane'; set data.classes=FILE"
    with pytest.raises(ConfigError, match=message):
        identify_files(**splits(tmp_path))
    (tmp_path / "classes.txt").write_text(CLASS_FILES["tabs"])
    mapped = splits(tmp_path, classes=str(tmp_path / "classes.txt"))
    identify_files(**mapped)
    for split, images in mapped.items():
        assert labelled(images) == labelled(load(folders, split == "train"))


def test_class_folders_with_named_val_refused(folders, tmp_path):
    """WordNet ids in one split and words in the other cannot be compared without a class file."""
    write_renamed(folders / "val", tmp_path / "val.parquet", NAMES)
    given = {"train": str(folders / "train"), "val": str(tmp_path / "val.parquet"), "index": str(tmp_path / "index")}
    with pytest.raises(ConfigError, match=r"label 0 is 'n01440764' and 'tench'; set data.classes=FILE"):
        identify_files(**splits(folders, **given))
    (tmp_path / "classes.txt").write_text(CLASS_FILES["synset words"])
    identify_files(**splits(folders, **given, classes=str(tmp_path / "classes.txt")))


def test_integers_without_names_accepted(folders, tmp_path):
    """ImageNet's shards rarely have class names; their number must be that of the class folders."""
    write_webdataset(folders / "val", tmp_path / "val")
    (tmp_path / "classes.txt").unlink()
    given = {"train": str(folders / "train"), "val": str(tmp_path / "val-*.tar"), "index": str(tmp_path / "index")}
    images = splits(folders, **given)
    identify_files(**images)
    assert labelled(images["val"]) == labelled(load(folders))


def test_class_names_of_shards_changed_noticed(folders, tmp_path, capsys):
    write_webdataset(folders / "train", tmp_path / "train")
    load(tmp_path, True)
    (tmp_path / "classes.txt").write_text("cat\ndog\nbird\n")
    load(tmp_path, True)
    assert f"data: {tmp_path}/classes.txt changed" in capsys.readouterr().out
