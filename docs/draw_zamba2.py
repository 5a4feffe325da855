"""`python docs/draw_zamba2.py` writes docs/zamba2.svg: layers, shared blocks, and one hybrid layer from inside."""

from __future__ import annotations

from html import escape
from pathlib import Path

TARGET = Path(__file__).with_name("zamba2.svg")
WIDTH, HEIGHT = 1060, 690
INK, MUTED = "#24292f", "#6e7781"
FILL = {"mamba": "#d7ebff", "A": "#ffe3c2", "B": "#e7d9ff", "own": "#d8f5dd", "plain": "#f6f8fa"}


def box(x: float, y: float, width: float, height: float, text: str, fill: str, size: int = 14, dash: str = "") -> str:
    """A rectangle with lines of text in its middle."""
    lines = text.split("\n")
    top = y + height / 2 - (len(lines) - 1) * (size + 3) / 2 + size * 0.35
    spans = "".join(
        f'<text x="{x + width / 2}" y="{top + i * (size + 3):.1f}" font-size="{size}" text-anchor="middle" '
        f'fill="{INK}">{escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="7" fill="{fill}" stroke="{INK}"{style}/>{spans}'
    )


def arrow(*points: tuple[float, float], dash: str = "", head: bool = True) -> str:
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    style = f' stroke-dasharray="{dash}"' if dash else ""
    end = ' marker-end="url(#head)"' if head else ""
    return f'<path d="{path}" fill="none" stroke="{INK}" stroke-width="1.5"{style}{end}/>'


def label(x: float, y: float, text: str, size: int = 13, anchor: str = "start", color: str = MUTED) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def plus(x: float, y: float) -> str:
    return (
        f'<circle cx="{x}" cy="{y}" r="10" fill="white" stroke="{INK}" stroke-width="1.5"/>'
        f'<path d="M{x - 5} {y} H{x + 5} M{x} {y - 5} V{y + 5}" stroke="{INK}" stroke-width="1.5"/>'
    )


def stack() -> list[str]:
    """The whole model: a column of layers beside the two blocks that some of them use."""
    left, width, right = 90, 150, 390
    # The first use reaches block A around block B.
    routes = [[(right + 115, 454), (right + 115, 238)], [(right, 318)], [(right, 182)]]
    parts = [label(30, 34, "The model", 18, color=INK)]
    rows = ["embed", "mamba", "A", "mamba", "B", "mamba", "A", "head"]
    texts = {"embed": "embedding e", "mamba": "Mamba2 layers", "head": "final norm, head = embeddingᵀ"}
    bottom, step, tall = 570, 68, 40
    use = 0
    for index, row in enumerate(rows):
        y = bottom - index * step
        middle = y + tall / 2
        if row in texts:
            fill = FILL["mamba"] if row == "mamba" else FILL["plain"]
            parts.append(
                box(
                    left - (40 if row == "head" else 0), y, width + (80 if row == "head" else 0), tall, texts[row], fill
                )
            )
        else:
            parts.append(box(left, y, width, tall, "hybrid layer", FILL["mamba"]))
            parts.append(box(left + width + 14, y + 4, 62, tall - 8, f"adapters\n+ linear {use}", FILL["own"], 11))
            parts.append(arrow((left + width + 76, middle), *routes[use], dash="4 3"))
            use += 1
        if index:
            parts.append(arrow((left + width / 2, y + step), (left + width / 2, y + tall)))
    parts.append(box(right, 148, 140, 90, "shared block A\nstored once", FILL["A"]))
    parts.append(box(right, 273, 95, 90, "shared\nblock B", FILL["B"]))
    parts.append(label(left - 8, bottom - 5 * step + 24, "h", 14, "end"))
    parts.append(label(30, 668, "Before a hybrid layer a shared block runs. Uses take turns: A, B, A, …"))
    return parts


def hybrid_layer() -> list[str]:
    """One hybrid layer: what the shared block reads, and where its output goes."""
    x, width = 660, 210
    parts = [label(x - 60, 34, "Hybrid layer j from inside", 18, color=INK)]
    parts.append(label(x + 40, 590, "h", 15, "middle", INK))
    parts.append(label(x + 160, 590, "e", 15, "middle", INK))
    parts.append(label(x + 176, 590, "the embedding, again", 12))
    steps = [
        ("[h, e], RMSNorm", FILL["A"]),
        ("attention of width 2d", FILL["A"]),
        ("RMSNorm", FILL["A"]),
        ("gated MLP", FILL["A"]),
        ("linear j", FILL["own"]),
    ]
    y, tall, step = 520, 36, 58
    for index, (text, fill) in enumerate(steps):
        top = y - index * step
        parts.append(box(x, top, width, tall, text, fill))
        if index:
            parts.append(arrow((x + width / 2, top + step), (x + width / 2, top + tall)))
        if text in ("attention of width 2d", "gated MLP"):
            parts.append(box(x + width + 24, top + 3, 84, tall - 6, "adapter j", FILL["own"], 12))
            parts.append(arrow((x + width + 24, top + tall / 2), (x + width, top + tall / 2)))
    parts.append(arrow((x + 40, 576), (x + 40, 556)))
    parts.append(arrow((x + 160, 576), (x + 160, 556)))
    # The stream passes the block on its left.
    stream = x - 40
    parts.append(arrow((x + 40, 566), (stream, 566), (stream, 90), head=False))
    join = 262
    parts.append(arrow((x + width / 2, 288), (x + width / 2, join + 10)))
    parts.append(plus(x + width / 2, join))
    parts.append(arrow((stream, join), (x + width / 2 - 10, join)))
    parts.append(label(x + width / 2 + 16, join + 5, "t: joins the mixer's input,"))
    parts.append(label(x + width / 2 + 16, join + 21, "not the stream"))
    parts.append(arrow((x + width / 2, join - 10), (x + width / 2, 232)))
    parts.append(box(x, 196, width, 36, "RMSNorm", FILL["mamba"]))
    parts.append(arrow((x + width / 2, 196), (x + width / 2, 166)))
    parts.append(box(x, 122, width, 44, "Mamba2 mixer:\nconvolution, SSD, gated norm", FILL["mamba"], 12))
    parts.append(arrow((x + width / 2, 122), (x + width / 2, 90), (stream + 10, 90)))
    parts.append(plus(stream, 90))
    parts.append(arrow((stream, 80), (stream, 56)))
    parts.append(label(stream + 14, 62, "h + mamba(norm(h + t))", 13, color=INK))
    parts.append(label(x - 60, 668, "Orange: the block's own weights. Green: owned by this use alone."))
    return parts


def drawing() -> str:
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
    )
    rule = f'<path d="M562 20 V640" stroke="{MUTED}" stroke-width="1" opacity="0.4"/>'
    body = "\n".join([marker, rule, *stack(), *hybrid_layer()])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f"\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
    print(TARGET)
