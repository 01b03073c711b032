"""Take a picture of the Ray dashboard of a running cluster, with a headless browser.

python docs/screenshot.py docs/dashboard.png [--page '#/jobs'] [--cluster NAME]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from manta.cluster import record

TOKEN_COOKIE = "ray-authentication-token"  # as Ray's dashboard names it
OPTIONS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1500,950"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--no-first-run"]


def main() -> None:
    """Open the page with the cluster's token and save what it shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--page", default="#/jobs")
    parser.add_argument("--wait-for", default="train", help="text that the page must show")
    parser.add_argument("--cluster", default=record.DEFAULT_NAME)
    args = parser.parse_args()
    cluster = record.find(args.cluster)
    options = webdriver.ChromeOptions()
    for option in OPTIONS + QUIET:
        options.add_argument(option)
    with webdriver.Chrome(options=options) as browser:
        browser.get(cluster.dashboard_url)
        token = Path(cluster.token_path).read_text().strip()
        browser.add_cookie({"name": TOKEN_COOKIE, "value": token, "path": "/"})
        browser.get(f"{cluster.dashboard_url}/{args.page}")
        browser.refresh()
        WebDriverWait(browser, 30).until(
            lambda page: args.wait_for in page.find_element(By.TAG_NAME, "body").text
        )
        browser.save_screenshot(str(args.output))


if __name__ == "__main__":
    main()
