/* Keeps a page fresh: asks for it again, and puts what has changed where it was. Without this the page is as it came. */
"use strict";
(() => {
    const page = document.querySelector("[data-refresh-seconds]");
    if (!page) {
        return;
    }
    const hold = document.getElementById("hold");
    const said = document.getElementById("refreshed");
    const parts = [...page.querySelectorAll("[data-refresh]")];
    let isStill = false;
    let isAsking = false;

    function say(text) {
        if (said.textContent !== text) {
            said.textContent = text;
        }
    }

    function put(part, fresh) {
        part.className = fresh.className;
        if (part.innerHTML === fresh.innerHTML) {
            return;
        }
        // Whoever goes through the links by keyboard stays at theirs.
        const links = (whole) => [...whole.querySelectorAll("a")];
        const at = links(part).indexOf(document.activeElement);
        const address = at < 0 ? null : document.activeElement.getAttribute("href");
        part.innerHTML = fresh.innerHTML;
        if (at >= 0) {
            const there = links(part);
            (there.find((link) => link.getAttribute("href") === address) || there[at])?.focus({ preventScroll: true });
        }
    }

    async function refresh() {
        if (isStill || isAsking || document.hidden) {
            return;
        }
        isAsking = true;
        try {
            const response = await fetch(location.href, { headers: { "X-Requested-With": "XMLHttpRequest" } });
            const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
            const found = parts.map((part) => fresh.getElementById(part.id));
            // Signed out, or an error: what is there is old, and stays.
            if (!response.ok || found.includes(null)) {
                throw new Error(response.statusText);
            }
            if (!isStill) {
                parts.forEach((part, place) => put(part, found[place]));
                say(said.dataset.going);
            }
        } catch {
            if (!isStill) {
                say(said.dataset.failed);
            }
        } finally {
            isAsking = false;
        }
    }

    hold.addEventListener("click", () => {
        isStill = !isStill;
        hold.setAttribute("aria-pressed", String(isStill));
        say(isStill ? said.dataset.still : said.dataset.going);
        refresh();
    });
    document.addEventListener("visibilitychange", refresh);
    setInterval(refresh, Number(page.dataset.refreshSeconds) * 1000);
    document.getElementById("refresh").hidden = false;
    say(said.dataset.going);
})();
