"""Run by a notebook's kernel when it starts (PYTHONSTARTUP): a figure with unlabelled axes is an error there."""

from IPython.core import pylabtools

_print_figure = pylabtools.print_figure


def _checked(figure, *arguments, **options):
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            axes_named = bool(axes.get_xlabel() or axes.get_ylabel())
        elif axes.axison:
            axes_named = bool(axes.get_xlabel() and axes.get_ylabel()) or _shares_labels(axes)
        else:
            axes_named = True
        if not axes_named:
            raise ValueError(f"An axis of the figure has no label: {axes.get_title() or axes}")
    return _print_figure(figure, *arguments, **options)


def _shares_labels(axes) -> bool:
    """Whether the labels that are missing stand at another panel of a shared axis."""
    x_named = any(other.get_xlabel() for other in axes.get_shared_x_axes().get_siblings(axes))
    y_named = any(other.get_ylabel() for other in axes.get_shared_y_axes().get_siblings(axes))
    return x_named and y_named


pylabtools.print_figure = _checked
