"""How the page looks where gradio draws it; demo.css has the rest."""

from fdml.demo.quick import Base


def theme() -> Base:
    """Our colours and the system's own fonts: nothing is loaded from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    return Base(primary_hue="blue", neutral_hue="gray", font=fonts, font_mono=mono).set(
        button_primary_background_fill="#00639c",
        button_primary_background_fill_dark="#00639c",
        button_primary_background_fill_hover="#004f7d",
        button_primary_background_fill_hover_dark="#0077bb",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        color_accent="#00639c",
        slider_color="#00639c",
        slider_color_dark="#74c3f7",
        checkbox_background_color_selected="#00639c",
        checkbox_background_color_selected_dark="#00639c",
        body_text_color_subdued="#565d6b",
        body_text_color_subdued_dark="#b1b8c6",
        block_label_text_color="#1b1f27",
        block_label_text_color_dark="#eceff4",
        block_info_text_color="#565d6b",
    )
