"""The queue's web page in a real browser, against the real server and a real database."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="selenium is not installed")

from queue_page import BROWSER, DRIVER, SUCCEEDED, Queue, Site, browser, enter, size
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.skipif(
    not (BROWSER.exists() and DRIVER.exists()), reason="no chromium with its chromedriver here"
)

ODD = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>&amp;'
VISITS = itertools.count()
IN_TIME_S = 8  # two rounds of polling, on a busy machine


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Queue]:
    made = Queue(tmp_path_factory.mktemp("queue"))
    yield made
    made.state.close()


@pytest.fixture(scope="module")
def site(queue: Queue) -> Iterator[Site]:
    served = Site(queue.state)
    served.start()
    yield served
    served.stop()


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chrome: Chrome, site: Site, queue: Queue) -> Iterator[Chrome]:
    """The queue's page, opened with the key; what the browser complained of fails the test."""
    size(chrome, 1240, 900)
    if not chrome.current_url.startswith(site.url):
        chrome.get(site.url)
    chrome.execute_script("sessionStorage.setItem('manta-key', arguments[0])", queue.key)
    chrome.get(f"{site.url}?{next(VISITS)}")  # another address: loads anew
    shows(chrome, "What happened")
    chrome.get_log("browser")
    yield chrome
    complaints = [line["message"] for line in chrome.get_log("browser")]
    answers = ("net::ERR_", "status of 404")  # Chromium writes these down whatever the page does
    assert [line for line in complaints if not any(word in line for word in answers)] == []
    assert chrome.execute_script("return window.hacked") is None


def text(page: Chrome) -> str:
    return page.find_element(By.TAG_NAME, "body").text


def shows(page: Chrome, *words: str) -> None:
    """Wait until the page has all these words, as a reader sees them."""
    wait(page, lambda: all(word in text(page) for word in words), f"{words} on the page")


def wait(page: Chrome, holds: Callable[[], object], what: str) -> None:
    WebDriverWait(page, IN_TIME_S, 0.1, ignored_exceptions=None).until(lambda _: holds(), what)


def view(page: Chrome, where: str) -> None:
    page.execute_script("location.hash = arguments[0]", f"#/{where}")


def count(page: Chrome, state: str) -> int:
    tile = page.find_element(By.CSS_SELECTOR, f".tile.{state} strong")
    return int(tile.text.replace(",", ""))


def test_a_wrong_key_is_refused_in_words_and_can_be_forgotten(
    chrome: Chrome, site: Site, queue: Queue
) -> None:
    enter(chrome, site.url, "manta_wrong")
    shows(chrome, "The queue does not know this key")
    enter(chrome, site.url, queue.key)
    shows(chrome, "What happened")
    assert queue.key not in chrome.current_url
    addresses = "return performance.getEntriesByType('resource').map(e => e.name).join(' ')"
    assert queue.key not in chrome.execute_script(addresses)
    chrome.find_element(By.ID, "forget").click()
    shows(chrome, "The queue asks for a key")
    assert chrome.execute_script("return sessionStorage.length") == 0
    assert "What happened" not in text(chrome)


def test_jobs_that_are_sent_and_change_are_seen_without_reload_with_what_they_wait_for(
    page: Chrome, queue: Queue
) -> None:
    page.execute_script("window.mark = 1")
    queued, succeeded = count(page, "queued"), count(page, "succeeded")
    job = queue.submit("live-1", team="ml")
    queue.submit("too-large", shape='[["CPU", 9000]]')
    shows(page, "live-1", "it is its turn")
    shows(page, "too-large", "it needs CPU: 9000; cluster `local` has 64 in all")
    assert count(page, "queued") == queued + 2
    queue.end(*queue.begin(job), SUCCEEDED)
    wait(page, lambda: count(page, "succeeded") == succeeded + 1, "its end is seen")
    assert count(page, "queued") == queued + 1
    assert page.execute_script("return window.mark") == 1


def test_what_looks_like_markup_is_shown_as_text(page: Chrome, queue: Queue) -> None:
    queue.begin(queue.submit("odd", name=ODD, entrypoint=f"echo {ODD}", user=ODD))
    queue.log("odd", f"loss 1.5 {ODD}\n")
    view(page, "jobs")
    shows(page, f"echo {ODD}", f"{ODD} · default")
    view(page, "jobs/odd")
    shows(page, ODD, f"loss 1.5 {ODD}", f"{ODD}, team default")
    assert page.find_elements(By.CSS_SELECTOR, "main img, main script") == []


def test_a_job_tells_its_story_without_the_values_of_its_variables(
    page: Chrome, queue: Queue
) -> None:
    environment = {"env_vars": {"API_TOKEN": "hush-hush"}, "pip": ["https://me:pw12@host/x.whl"]}
    queue.begin(queue.submit("story", runtime_env_passthrough=environment))
    view(page, "jobs/story")
    shows(page, "python story.py", "submitted", "attempt 1 on cluster local", "API_TOKEN")
    page.find_element(By.TAG_NAME, "summary").click()
    shows(page, "https://…@host/x.whl")
    assert "hush-hush" not in page.page_source


def test_a_log_is_followed_while_it_grows_and_only_its_end_is_read(
    page: Chrome, queue: Queue
) -> None:
    queue.begin(queue.submit("talker"))
    queue.log("talker", "".join(f"line {n} {'.' * 90}\n" for n in range(2000)))
    view(page, "jobs/talker")
    shows(page, "bytes are left out", "line 1999 ")
    assert "line 3 " not in text(page)
    queue.log("talker", "häßlich at the end\n")
    shows(page, "häßlich at the end")


def test_jobs_are_filtered_and_paged(page: Chrome, queue: Queue) -> None:
    for number in range(60):
        queue.submit(f"many-{number:02d}", user="dora")
    view(page, "jobs?user=dora")
    shows(page, "many-59", "many-10", "Older")
    assert "many-09" not in text(page)
    page.find_element(By.PARTIAL_LINK_TEXT, "Older").click()
    shows(page, "many-09", "many-00", "Newest")
    field = page.find_element(By.NAME, "team")
    field.send_keys("nobody\n")
    shows(page, "No such jobs.")
    assert "team=nobody" in page.current_url


def test_a_pipeline_is_drawn_by_its_needs_and_its_steps_change_as_their_jobs_do(
    page: Chrome, queue: Queue
) -> None:
    queue.run("quick-1")
    view(page, "pipelines")
    shows(page, "quick-1", "0 of 7 steps")
    assert len(page.find_elements(By.CSS_SELECTOR, ".graph .edge")) == 6
    queue.end(*queue.begin(queue.begin_step("quick-1", "prepare")), SUCCEEDED)
    queue.settle_step("quick-1", "prepare")
    queue.begin(queue.begin_step("quick-1", "tune"))
    shows(page, "1 of 7 steps")
    wait(page, lambda: page.find_elements(By.CSS_SELECTOR, "a.step.running"), "a step runs")
    page.find_element(By.CSS_SELECTOR, "a.step.succeeded").click()
    shows(page, "python quick-1-prepare.py")


def test_no_view_is_wider_than_a_phone(page: Chrome, queue: Queue) -> None:
    long = f"{'long-' * 24}x"
    queue.begin(queue.submit(long, entrypoint="python " + "x" * 400, user="u" * 90))
    queue.log(long, "y" * 3000)
    queue.run("wide-1")
    size(page, 375, 740)
    titles = {"": "Queue", "jobs": "Jobs", f"jobs/{long}": long}
    titles |= {"pipelines": "Pipelines", "usage": "Usage"}
    for where, title in titles.items():
        view(page, where)
        wait(page, lambda title=title: page.title.startswith(title), title)
        page.execute_script("window.scrollTo(500, 0)")
        told = "return [document.documentElement.scrollWidth, window.scrollX, innerWidth]"
        assert page.execute_script(told) == [375, 0, 375], where


def test_usage_is_added_up_by_team(page: Chrome, queue: Queue) -> None:
    job, attempt = queue.begin(queue.submit("used", team="labs", shape='[["CPU", 4]]'))
    queue.end(job, attempt, SUCCEEDED, job.started_at + 1800 if job.started_at else None)
    view(page, "usage")
    shows(page, "labs", "CPU-hours", "USD")


def test_a_server_that_goes_and_comes_back_is_said_and_survived(
    page: Chrome, queue: Queue, site: Site
) -> None:
    site.stop()
    shows(page, "Not reachable since")
    assert "What happened" in text(page), "what was known stays"
    queue.submit("meanwhile")
    site.start()
    shows(page, "meanwhile")
    assert "Not reachable" not in text(page)


def test_a_hidden_tab_asks_for_nothing(page: Chrome, queue: Queue) -> None:
    hide = "Object.defineProperty(document, 'hidden', {value: arguments[0], configurable: true});"
    hide += "document.dispatchEvent(new Event('visibilitychange'))"
    requests = "return performance.getEntriesByType('resource').length"
    page.execute_script(hide, True)
    page.execute_async_script("setTimeout(arguments[0], 300)")  # what was under way
    before = page.execute_script(requests)
    queue.submit("unseen")
    page.execute_async_script("setTimeout(arguments[0], 2300)")
    assert page.execute_script(requests) == before
    page.execute_script(hide, False)
    shows(page, "unseen")


def test_the_page_can_be_walked_with_the_keyboard(page: Chrome) -> None:
    page.refresh()  # the key is still there, and nothing has the focus
    shows(page, "What happened")
    names = []
    for _ in range(6):
        page.switch_to.active_element.send_keys("\ue004")  # Tab
        names.append(page.switch_to.active_element.text)
    assert names == ["Manta", "Queue", "Jobs", "Pipelines", "Usage", "Forget key"]


def test_the_story_of_an_unknown_job_is_one_line(page: Chrome) -> None:
    view(page, "jobs/none")
    shows(page, "no job none")


def test_pictures_of_the_guide_can_be_made(tmp_path: Path, queue: Queue) -> None:
    """The plausible queue of `queue_page.py` is one that the store accepts."""
    from queue_page import fill

    fill(Queue(tmp_path))
