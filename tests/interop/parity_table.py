"""python -m tests.interop.parity_table: how far our features are from those of transformers, for docs/weights.md."""

import tempfile

from tests.interop.families import FAMILIES, OTHER_PX, compare


def main() -> None:
    print("| model of transformers | image sides | greatest difference |")
    print("|---|---|---|")
    for name, family in FAMILIES.items():
        model = family.make()
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            sides = (model.config.image_size, OTHER_PX)
            worst = max(compare(model, name, directory, side)[0] for side in sides)
        print(f"| {name} | {' and '.join(map(str, sides))} px | {worst:.1e} |")


if __name__ == "__main__":
    main()
