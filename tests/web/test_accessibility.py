"""Accessibility of the chat page: screen readers, keyboard, contrast and reduced motion."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.web.conftest import SLOW_S, OpenPage, Serve, ask, occupy_slot

# Contrast (WCAG 2.2) of all visible text, with the colours that the browser paints.
LOW_CONTRAST = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const paint = (...colours) => {
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (rgb) => {
        const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const grounds = (element) => {
        const found = [];
        for (let e = element; e; e = e.parentElement) found.unshift(getComputedStyle(e).backgroundColor);
        return ["white", ...found];
    };
    const low = [];
    for (const element of document.querySelectorAll("body *")) {
        const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const isSeen = element.checkVisibility() && !element.closest(".unseen");
        if (!isSeen || (!hasText && element.tagName !== "TEXTAREA")) continue;
        for (const pseudo of [null, ...(element.placeholder ? ["::placeholder"] : [])]) {
            const under = grounds(element);
            const ratio = [paint(...under), paint(...under, getComputedStyle(element, pseudo).color)]
                .map(luminance).sort((a, b) => b - a).map((v) => v + 0.05).reduce((a, b) => a / b);
            if (ratio < 4.5) low.push(`${element.className || element.tagName}: ${ratio.toFixed(2)}`);
        }
    }
    return low;
}"""


def low_contrast(page: Page) -> list[str]:
    found: list[str] = []
    for color_scheme in ("light", "dark"):
        page.emulate_media(color_scheme=color_scheme)
        found += page.evaluate(LOW_CONTRAST)
    return found


def press_tab(page: Page) -> str:
    """Press Tab and return the name of the focused element."""
    page.keyboard.press("Tab")
    focused = page.locator(":focus")
    return focused.get_attribute("aria-label") or focused.inner_text()


def test_the_page_has_landmarks_headings_and_labels(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    expect(page.get_by_role("banner")).to_have_count(1)
    expect(page.get_by_role("main", name="Conversation")).to_have_count(1)
    expect(page.get_by_role("contentinfo")).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_text("ChatStream")
    expect(page.get_by_role("textbox", name="Your message")).to_have_accessible_description(
        "Enter sends, Shift + Enter starts a new line."
    )
    ask(page, "hello")
    expect(page.locator(".meta")).to_contain_text("complete")
    expect(page.get_by_role("article").get_by_role("heading", level=2)).to_have_text(["You", "Answer"])


def test_tab_reaches_every_control_which_shows_its_focus(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    ask(page, "hello")
    expect(page.locator(".meta")).to_contain_text("complete")
    page.reload()
    expect(page.get_by_role("textbox")).to_be_focused()
    page.get_by_role("button", name="日本語").focus()
    assert page.locator(":focus").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    for name in ("New chat", "Conversation", "Copy", "Regenerate", "Your message", "Send"):
        assert press_tab(page) == name
        frame = page.locator(".composer:focus-within") if name == "Your message" else page.locator(":focus")
        assert frame.evaluate("e => getComputedStyle(e).outlineStyle") == "solid", name


def test_the_focus_moves_to_the_input_when_the_focused_button_is_removed(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    occupy_slot(page)
    page.get_by_role("button", name="Stop").focus()
    page.keyboard.press("Enter")
    field = page.get_by_role("textbox", name="Your message")
    expect(page.locator(".meta")).to_contain_text("stopped by you")
    expect(field).to_be_focused()
    page.get_by_role("button", name="Regenerate").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(field).to_be_focused()


def test_one_live_region_announces_the_status_but_not_the_tokens(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S))
    expect(page.locator("[aria-live], [role=status], [role=alert], [role=log]")).to_have_count(1)
    ask(page, "word " * 30)
    expect(page.locator(".answer")).to_contain_text("word word")
    expect(page.get_by_role("status")).to_have_text("The answer starts")
    expect(page.get_by_role("status")).to_have_text("The answer is complete")


def test_all_text_has_enough_contrast_in_light_and_dark(serve: Serve, open_page: OpenPage) -> None:
    url = serve(max_concurrency=1, max_queue_size=1, time_per_token_s=SLOW_S)
    page, waiting = (open_page(url) for _ in range(2))
    refused = open_page(url, expects_failed_requests=True)
    assert low_contrast(page) == []
    ask(page, "short")
    expect(page.locator(".meta")).to_contain_text("complete")
    occupy_slot(page)
    ask(waiting, "waits")
    expect(waiting.locator(".position")).to_be_visible()
    ask(refused, "is refused")
    expect(refused.locator(".notice")).to_be_visible()
    for each in (page, waiting, refused):
        assert low_contrast(each) == []


def test_nothing_moves_under_prefers_reduced_motion(serve: Serve, open_page: OpenPage) -> None:
    page = open_page(serve(time_per_token_s=SLOW_S), reduced_motion="no-preference")
    occupy_slot(page)
    assert page.evaluate("document.getAnimations().length") > 0
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0


def test_page_fits_phones_and_desktops(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    ask(page, "x" * 500)
    expect(page.locator(".meta")).to_be_visible()
    for language in ("日本語", "English"):
        page.get_by_role("button", name=language).click()
        for width in (320, 375, 1280):
            page.set_viewport_size({"width": width, "height": 640})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.get_by_role("main").evaluate("e => e.scrollWidth <= e.clientWidth")


def test_both_languages_have_the_same_texts(url: str, open_page: OpenPage) -> None:
    page = open_page(url)
    english, japanese = page.evaluate(
        """async () => {
            const i18n = await import("./static/i18n.js");
            const shape = (words) => Object.entries(words).map(([key, value]) =>
                [key, typeof value === "object" ? shape(value) : typeof value]);
            const first = shape(i18n.words());
            i18n.switchLanguage();
            return [first, shape(i18n.words())];
        }"""
    )
    assert english == japanese
