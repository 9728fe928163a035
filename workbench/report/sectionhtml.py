"""A section as HTML: the headline, one picture, and everything else folded below them."""

from __future__ import annotations

from markupsafe import Markup

from workbench.core.numbers import counted
from workbench.core.stats import Estimate
from workbench.report.blockhtml import block_html, prose, titled
from workbench.report.blocks import Block, Table, Text, Tokens
from workbench.report.headline import Headline, Measured, Place, shown_measured
from workbench.report.section import Section
from workbench.report.tablehtml import cell_html, table_html
from workbench.report.text import sentence, visible


def section_body(section: Section, level: int, name: str = "section", feature_page: str = "") -> Markup:
    """The section below its heading.

    Args:
        section: what is shown.
        level: of the heading.
        name: of the section; ids on the page begin with it.
        feature_page: page with the cards of the SAE's features; "" without one.
    """
    parts = [Markup("<h{0}>{1}</h{0}>").format(level, visible(section.title))]
    if section.headline is not None:
        parts.append(headline_html(section.headline, section, name))
    picture = section.picture
    if picture is not None:
        parts.append(_shown(picture, section, name, feature_page))
    if section.findings:
        items = Markup("").join(Markup("<li>{}</li>").format(sentence(text)) for text in section.findings)
        findings = Markup('<ul class="findings">{}</ul>').format(items)
        # without a headline the findings are all that says what was found
        summary = f"All of what was found, in {counted(len(section.findings), 'sentences')}"
        parts.append(findings if section.headline is None else _folded(summary, findings))
    parts += [_block(block, section, name, feature_page) for block in section.blocks if block is not picture]
    if section.metrics:
        parts.append(_folded("Numbers kept in result.json", _metrics_table(section)))
    return Markup("\n").join(parts)


def headline_html(headline: Headline, section: Section, name: str) -> Markup:
    """Verdict, sentence, and the number beside its control, each a link to the row that it was read from."""
    line = Markup('<p class="headline">{} {}</p>').format(badge(headline), sentence(headline.sentence))
    cells = [(headline.measure, headline.value, headline.place)]
    if headline.control is not None:
        cells.append((headline.control_name, headline.control, headline.control_place))
    if headline.difference is not None:
        cells.append((headline.difference_name, headline.difference, headline.difference_place))
    if headline.value is None:
        return line
    facts = Markup("").join(
        Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(visible(label), number_html(value, place, section, name))
        for label, value, place in cells
    )
    return Markup('{}<dl class="facts-beside">{}</dl>').format(line, facts)


def badge(headline: Headline) -> Markup:
    """The verdict as a coloured word."""
    kind = headline.verdict.split(" ")[0]
    return Markup('<span class="badge {}">{}</span>').format(kind, headline.verdict)


def number_html(value: Measured, place: Place | None, section: Section, name: str) -> Markup:
    """A number that links to the row of the table that it was read from."""
    shown = (
        cell_html(value, with_n=False)
        if isinstance(value, Estimate)
        else Markup("<b>{}</b>").format(shown_measured(value))
    )
    anchor = None if place is None else _anchor(place, section, name)
    return shown if anchor is None else Markup('<a href="#{}">{}</a>').format(anchor, shown)


def _shown(block: Block, section: Section, name: str, feature_page: str) -> Markup:
    if isinstance(block, Table):
        return titled(block.name, table_html(block, _anchors(block, section, name), feature_page))
    return block_html(block)


def _block(block: Block, section: Section, name: str, feature_page: str) -> Markup:
    if isinstance(block, Text):
        return _folded("How it was measured", prose(block.text))
    if isinstance(block, Table):
        rows = Markup(" <small>{}</small>").format(counted(len(block.rows), "rows"))
        table = table_html(block, _anchors(block, section, name), feature_page)
        return _folded(Markup("{}{}").format(visible(block.name), rows), table)
    title = block.caption if isinstance(block, Tokens) else block.title
    return _folded(title or block.kind, block_html(block))


def _folded(summary: str | Markup, content: Markup) -> Markup:
    shown = summary if isinstance(summary, Markup) else visible(summary)
    return Markup("<details><summary>{}</summary>{}</details>").format(shown, content)


def _anchor(place: Place, section: Section, name: str) -> str | None:
    for i, block in enumerate(section.blocks):
        if isinstance(block, Table) and block.name == place.table:
            rows = [str(row[0]) for row in block.rows]
            return f"{name}-{i}-{rows.index(place.row)}" if place.row in rows else None
    return None


def _anchors(table: Table, section: Section, name: str) -> dict[int, str]:
    """Ids of the rows of a table that the headline was read from."""
    headline = section.headline
    places = () if headline is None else (headline.place, headline.control_place, headline.difference_place)
    anchors = [_anchor(place, section, name) for place in places if place is not None and place.table == table.name]
    return {int(anchor.rsplit("-", 1)[1]): anchor for anchor in anchors if anchor is not None}


def _metrics_table(section: Section) -> Markup:
    rows = Markup("").join(
        Markup('<tr><td>{}</td><td class="num">{}</td><td>{}</td></tr>').format(
            visible(name), cell_html(metric), visible(metric.method) if isinstance(metric, Estimate) else ""
        )
        for name, metric in section.metrics.items()
    )
    return Markup(
        '<div class="scroll" tabindex="0"><table><thead><tr>'
        '<th scope="col">metric</th><th scope="col" class="num">value</th><th scope="col">interval by</th>'
        "</tr></thead><tbody>{}</tbody></table></div>"
    ).format(rows)
