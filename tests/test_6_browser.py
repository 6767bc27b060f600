"""The tests' own browser sees what goes wrong on a page, and acts as a person does."""
import base64

from PIL import Image

PAGE = """<!DOCTYPE html><title>t</title>
<style>body { background: white } @media (prefers-color-scheme: dark) { body { background: black } }
</style>
<input id=text><input id=slider type=range max=9 value=0><input id=file type=file>
<button id=ok onclick="clicked = true">ok</button>"""


def address(html):
    return "data:text/html;base64," + base64.b64encode(html.encode()).decode()


def test_it_types_clicks_presses_and_takes_pictures(browser, tmp_path):
    page = browser.open(address(PAGE), width=400, height=300, dark=True)
    page.click("#text")
    page.type("größe </script>")
    assert page.js("document.querySelector('#text').value") == "größe </script>"
    page.press("Tab")
    page.press("ArrowRight", 3)
    assert page.js("document.querySelector('#slider').value") == "3"
    page.click("#ok")
    page.wait("window.clicked")
    (tmp_path / "a.txt").write_text("letters")
    page.choose_file("#file", tmp_path / "a.txt")
    assert page.js("document.querySelector('#file').files[0].text()") == "letters"
    page.screenshot(tmp_path / "page.png")
    shot = Image.open(tmp_path / "page.png").convert("RGB")
    assert shot.size == (400, 300) and shot.getpixel((399, 299)) == (0, 0, 0)
    assert not page.problems and not page.requests
    page.close()


def test_it_sees_what_goes_wrong(browser):
    broken = """<script>console.error("said"); setTimeout(() => { throw new Error("thrown") })
    </script><img src="http://127.0.0.1:9/lost.png">"""
    page = browser.open(address(PAGE + broken))
    page.wait("document.querySelector('img').complete")
    found = " ".join(page.problems)
    assert "said" in found and "thrown" in found and "lost.png" in found
    assert page.requests == ["http://127.0.0.1:9/lost.png"]
    page.close()
