"""Makes the data embedded in the package: the first 6,000 train and 2,000 test images of Fashion-MNIST, in one file.

Run from the repository root, with the full set at hand (see `anybatch.lab.idx` for where it is looked for):
    python scripts/make_embedded_data.py
"""

import io
import lzma
from pathlib import Path

import numpy as np

from anybatch.lab.data import EMBEDDED_ASSET, EMBEDDED_TRAIN
from anybatch.lab.idx import fashion_mnist_arrays
from anybatch.reporting.files import write_atomically

TEST_IMAGES = 2000


def main() -> None:
    train_images, train_labels, test_images, test_labels = fashion_mnist_arrays()
    rows = np.concatenate(
        [
            np.column_stack([labels[:n], images[:n].reshape(n, -1)])
            for images, labels, n in (
                (train_images, train_labels, EMBEDDED_TRAIN),
                (test_images, test_labels, TEST_IMAGES),
            )
        ]
    )
    buffer = io.BytesIO()
    np.save(buffer, rows)
    # LZMA is 14 % smaller than the deflate of an .npz here, and unpacks in 0.2 s.
    content = lzma.compress(buffer.getvalue(), preset=9)
    target = Path(__file__).parents[1] / "src" / "anybatch" / "lab" / "assets" / EMBEDDED_ASSET
    write_atomically(target, content)
    print(f"{target}: {rows.shape[0]} images, {len(content):,} bytes")


if __name__ == "__main__":
    main()
