"""Active experts by layer and token: as a chart with matplotlib, and as text without it.

    python active_experts.py MODEL --prompt "Once upon a time" --out active.png
"""

import argparse

import dsmoe
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description="Show how many experts the tokens of a text run in every layer.")
    parser.add_argument("model")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--out", help="image to write")
    args = parser.parse_args()

    model = dsmoe.load(args.model)
    ids = model.encode(args.prompt)
    routing = model.routing(ids)
    words = [model.decode(ids[i : i + 1], skip_special=False) for i in range(len(ids))]

    means = routing.counts.mean(axis=1)
    for layer, mean in enumerate(means):
        bar = "#" * round(40 * mean / model.num_experts)
        print(f"layer {layer:3}  {mean:6.2f} of {model.num_experts}  {bar}")
    most = routing.counts.sum(axis=0)
    print("most experts:", ", ".join(repr(words[i]) for i in np.argsort(-most, kind="stable")[:3]))
    print(f"active share {routing.summary['active_ratio']:.6f}")

    if args.out:
        try:
            import matplotlib
        except ModuleNotFoundError:
            print("SKIP the chart: no matplotlib")
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(max(4, len(ids) / 3), 4), layout="constrained")
        image = axes.imshow(routing.counts, aspect="auto", vmin=0, vmax=model.num_experts)
        axes.set(ylabel="layer", xticks=range(len(ids)))
        axes.set_xticklabels(words, rotation=90)
        figure.colorbar(image, label="active experts")
        figure.savefig(args.out)


if __name__ == "__main__":
    main()
