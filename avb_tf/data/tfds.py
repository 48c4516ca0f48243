"""Image data sets from tensorflow_datasets, an optional dependency."""

from avb_tf.data import arrays
from avb_tf.data.source import Source, data_path
from avb_tf.errors import UserError


def load(name: str, path: str, seed: int) -> Source:
    """Reads the features `image` and `label` of the splits train, validation and test into memory.

    Args:
      name: name of the data set in tensorflow_datasets, such as "fashion_mnist".
      path: the data folder of tensorflow_datasets; if empty, the folder named by AVB_TF_DATA_DIR,
        or the default folder of tensorflow_datasets.
      seed: seed for cutting a tenth off train for each missing validation or test split.

    Raises:
      UserError: the package or the data set is missing, or the images differ in shape.
    """
    try:
        import tensorflow_datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"'tfds:{name}' needs tensorflow_datasets, which cannot be imported ({error}); "
            'install it with pip install "avb_tf[tfds]"'
        ) from error
    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_path(path) or None)
        builder.download_and_prepare()
        splits = {split: split for split in arrays.SPLITS if split in builder.info.splits}
        data = builder.as_dataset(split=splits, batch_size=-1)
        content = {f"x_{split}": data[split]["image"].numpy() for split in splits}
        if "label" in builder.info.features:
            content |= {f"y_{split}": data[split]["label"].numpy() for split in splits}
    except Exception as error:  # each data set raises different exception types
        reason = f"{type(error).__name__}: {error}".splitlines()[0]  # the rest lists all data sets
        raise UserError(
            f"'tfds:{name}' cannot be read ({reason}); expected a data set of tensorflow_datasets "
            "with a feature `image` of one shape; check its name, the network and config.data.path"
        ) from error
    place = f"tfds:{name}"
    return arrays.source(place, place, arrays.check(place, content), seed)
