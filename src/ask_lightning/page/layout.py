"""The parts of the page, and how they are connected."""

from functools import partial
from pathlib import Path
from typing import Any

from ask_lightning.page.clip_cards import answer_html
from ask_lightning.page.clip_map import choose_rows, map_html, place_points
from ask_lightning.page.collection import MOST_SHOWN, Answer, Collection, answer_query, filter_matches
from ask_lightning.page.texts import as_html, as_unicode

_SECONDS_OF_UPLOADS = 3600
_NO_LIMIT = -1
_COUNTS = (1, MOST_SHOWN, 10)  # of hits: at least, at most, at first


def make_theme(gradio: Any) -> Any:
    """Colours with enough contrast for text, and fonts of the system, so that none is loaded.

    Args:
        gradio: The package.
    """
    return gradio.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["monospace"],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_background_fill="none",
        block_title_padding="0",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_label_background_fill="none",
        block_label_background_fill_dark="none",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_600",
        color_accent="*primary_700",
    )


class _Handlers:
    """What the parts of the page call when they are used; each gives the answer, and it as HTML.

    A field in which nobody has typed yet may hold None.

    Args:
        collection: The clips.
    """

    def __init__(self, collection: Collection) -> None:
        self._collection = collection

    def show(self, answer: Answer, words: str | None, lowest: float, count: int) -> str:
        """An answer through the filters."""
        limit = lowest if lowest > _NO_LIMIT else None
        left = (words or "") if answer.finds_all else ""  # by which a search of the best ones went already
        shown = filter_matches(self._collection, answer.matches, words=left, lowest=limit, count=int(count))
        return answer_html(self._collection, answer, shown)

    def ask(
        self, query: str | Path | None, refined: bool, words: str | None, *others: Any
    ) -> tuple[Answer, str]:
        """The answer to a text, or to a sound in a file."""
        answer = answer_query(self._collection, query, refined, words or "")
        return answer, self.show(answer, words, *others)

    def ask_sound(self, path: str | None, refined: bool, *filters: Any) -> tuple[Answer, str]:
        """The answer to a sound that was given."""
        return self.ask(None if path is None else Path(path), refined, *filters)

    def ask_again(self, answer: Answer, refined: bool, *filters: Any) -> tuple[Answer, str]:
        """The answer to the same query, with the refinement or without."""
        if answer.query is None:
            return answer, self.show(answer, *filters)
        return self.ask(answer.query, refined, *filters)

    def filter_by_words(self, answer: Answer, refined: bool, *filters: Any) -> tuple[Answer, str]:
        """An answer through other words; asked for again where not all clips were looked at."""
        if answer.finds_all:
            return answer, self.show(answer, *filters)
        return self.ask_again(answer, refined, *filters)


def make_blocks(gradio: Any, collection: Collection) -> Any:
    """Lay out the page and connect its parts.

    Args:
        gradio: The package.
        collection: The clips.
    """
    handlers = _Handlers(collection)
    with gradio.Blocks(
        title=as_unicode(f"Search sounds: {collection.title}"),
        analytics_enabled=False,
        delete_cache=(_SECONDS_OF_UPLOADS, _SECONDS_OF_UPLOADS),
        fill_width=True,
    ) as blocks:
        gradio.HTML(
            # What is said to screen readers stays the same element, for new ones are not listened to.
            '<a class="skip" href="#results">Skip to the results</a>'
            f'<header class="page" data-of="{collection.key}"><h1>Search sounds</h1>'
            f"<p>{as_html(collection.title)}</p></header>"
            '<div id="said" class="unseen" role="status" aria-live="polite"></div>',
            elem_id="page-header",
        )
        with gradio.Tabs():
            with gradio.Tab("Search"), gradio.Row(elem_id="search"):
                with gradio.Column(scale=1, min_width=280, elem_id="query"):
                    text = gradio.Textbox(
                        label="Describe a sound",
                        placeholder="a dog barks in the rain",
                        lines=1,
                        max_lines=1,
                        max_length=1000,
                        autofocus=True,
                        elem_id="text",
                    )
                    button = gradio.Button("Search", variant="primary", elem_id="ask")
                    sound = gradio.Audio(
                        label="Or give a sound",
                        sources=["upload", "microphone"],
                        type="filepath",
                        editable=False,
                        elem_id="sound",
                    )
                    with gradio.Accordion("Filters", open=True, elem_id="filters"):
                        words = gradio.Textbox(
                            label="Caption or name contains", lines=1, max_lines=1, elem_id="words"
                        )
                        lowest = gradio.Slider(
                            _NO_LIMIT,
                            1,
                            value=_NO_LIMIT,
                            step=0.01,
                            label="Lowest score",
                            info=f"{_NO_LIMIT}: no limit",
                            elem_id="lowest",
                        )
                        count = gradio.Slider(
                            *_COUNTS[:2], value=_COUNTS[2], step=1, label="Clips to show", elem_id="count"
                        )
                        refinement = collection.refinement
                        refined = gradio.Checkbox(
                            label="" if refinement is None else refinement.label,
                            info=None
                            if refinement is None
                            else f"{refinement.explanation}. Off: by cosine similarity.",
                            value=refinement is not None,
                            visible=refinement is not None,
                            elem_id="refined",
                        )
                with gradio.Column(scale=3, min_width=320):
                    found = gradio.HTML(answer_html(collection, Answer(), []), elem_id="answer")
            with gradio.Tab("Map", elem_id="map-tab"):
                rows = choose_rows(len(collection))
                gradio.HTML(map_html(collection, rows, place_points(collection.embeddings[rows])))
        answer = gradio.State(Answer())
        filters = [words, lowest, count]
        # One after another, in the order in which they were asked for: else what is given during a slow
        # search, such as another query or a filter, would be lost under the answer of that search.
        in_order = {"concurrency_id": "search", "trigger_mode": "always_last", "api_visibility": "private"}
        outputs = [answer, found]
        gradio.on([text.submit, button.click], handlers.ask, [text, refined, *filters], outputs, **in_order)
        gradio.on(
            [sound.upload, sound.stop_recording],
            handlers.ask_sound,
            [sound, refined, *filters],
            outputs,
            **in_order,
        )
        # What is typed into the field of a slider is sent before it is whole, as nothing or beyond the ends.
        for slider, (least, most, usual) in ((lowest, (_NO_LIMIT, 1, _NO_LIMIT)), (count, _COUNTS)):
            slider.preprocess = partial(within, least=least, most=most, usual=usual)
        refined.input(handlers.ask_again, [answer, refined, *filters], outputs, **in_order)
        quietly = {"show_progress": "hidden", **in_order}
        # What is deleted from a field sends no `input`.
        words.change(handlers.filter_by_words, [answer, refined, *filters], outputs, **quietly)
        gradio.on([lowest.input, count.input], handlers.show, [answer, *filters], found, **quietly)
    return blocks


def within(value: object, least: float, most: float, usual: float) -> float:
    """The number that a slider stands for.

    Args:
        value: What the browser sent, of any type.
        least: The lowest number of the slider.
        most: The highest number of the slider.
        usual: What stands for a value that is no number, as while the field is empty.

    Examples:
        >>> [within(value, 1, 50, 10) for value in (7, 99, -3, None, "many")]
        [7, 50, 1, 10, 10]
    """
    if isinstance(value, int | float) and value == value:  # no NaN
        return min(max(value, least), most)
    return usual
