"""The colours of all figures."""

BLUE, RED, ORANGE, GREEN, GREY, DARK = "#1f5fa8", "#c0392b", "#d9822b", "#2a9d55", "#777777", "#333333"
BASELINE_COLOURS = ("#8e5ea2", GREEN, "#b8860b", "#444444")
