"""References without labels: the text cites by author and year, so "[CGL83]" would lead nowhere."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform


class NoLabels(SphinxPostTransform):
    default_priority = 6  # after sphinxcontrib-bibtex has written the list

    def run(self, **kwargs) -> None:
        for label in list(self.document.findall(nodes.label)):
            if isinstance(label.parent, nodes.citation):
                label.parent.remove(label)


def setup(app: Sphinx) -> dict:
    app.add_post_transform(NoLabels)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
