"""The figures of scores by their old place."""

from cedm_ray.report.cluster_figures import score_figure as score_figure
from cedm_ray.report.curve_figures import curves_figure as curves_figure
