"""What layout files hold: counts, sizes, alignment and overlap, beside the page grammar's pages.

Method: loads each file with its source, prints the classes' shares, the mean number of elements,
the mean width and height by class, 100 A (and with the padding mistake of common code, "compat"),
O, and the covered share; then the same of as many pages of the grammar, for PubLayNet's classes.

    python benchmarks/layout_files.py --publaynet val.json --rico rico25.npz --max-elements 20
"""

import argparse

from domains.layout.metrics import class_total_variation, source_layouts
from domains.layout.page import measures
from domains.layout.samples import Layouts
from domains.layout.sources import Grammar, JSONLayouts, PubLayNet, RicoArrays, Source

NUM_PAGES = 2000


def describe(name: str, layouts: Layouts) -> None:
    """Print one table."""
    valid = layouts.valid
    right, compat = (100 * measures.alignment(layouts, compat=c).mean() for c in (False, True))
    print(f"\n{name}: {len(layouts)} layouts, {valid.sum(dim=1).float().mean():.2f} elements each")
    print(
        f"100 A {right:.3f} (compat {compat:.3f}), O {measures.overlap(layouts).mean():.3f}, "
        f"covered {measures.coverage(layouts).mean():.3f}"
    )
    print("| class | share | width | height |\n|---|---|---|---|")
    for label, title in enumerate(layouts.classes):
        chosen = layouts.labels == label
        if chosen.any():
            width, height = layouts.boxes[chosen][:, 2:].mean(dim=0).tolist()
            share = float(chosen.sum() / valid.sum())
            print(f"| {title} | {share:.3f} | {width:.3f} | {height:.3f} |")


def main() -> None:
    """Describe every file given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publaynet", help="a COCO file")
    parser.add_argument("--rico", help="an .npz file of arrays")
    parser.add_argument("--json", help="a .jsonl file or a folder that predict wrote")
    parser.add_argument("--max-elements", type=int, default=20)
    options = parser.parse_args()
    slots = options.max_elements
    sources: dict[str, Source] = {}
    if options.publaynet:
        sources["PubLayNet"] = PubLayNet(options.publaynet, slots)
    if options.rico:
        sources["RICO"] = RicoArrays(options.rico, slots)
    if options.json:
        sources["JSON"] = JSONLayouts(options.json, slots)
    made = source_layouts(Grammar(NUM_PAGES, slots))
    for name, source in sources.items():
        layouts = source_layouts(source)
        describe(name, layouts)
        if layouts.classes == made.classes:
            print(
                f"class total variation from the grammar: "
                f"{class_total_variation(layouts, made):.3f}"
            )
    describe("page grammar", made)


if __name__ == "__main__":
    main()
