/* Shows what changes while it changes: asks for the page again, and puts each live part where it was. It stops when
   nothing changes any more, and rests while nobody looks. Without it the page is as it came, and a reload shows the rest. */
"use strict";
(() => {
    const SECONDS = 2;
    const main = document.getElementById("main");
    let isAsking = false;

    function put(part, fresh) {
        if (part.innerHTML === fresh.innerHTML) {
            return;
        }
        // Whoever goes through the links by keyboard stays at theirs.
        const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
        part.innerHTML = fresh.innerHTML;
        if (focused) {
            const link = [...part.querySelectorAll("a")].find((each) => each.getAttribute("href") === focused);
            (link || main).focus({ preventScroll: true });
        }
    }

    async function look() {
        if (isAsking || document.hidden || !("changing" in main.dataset)) {
            return;
        }
        isAsking = true;
        try {
            const response = await fetch(location.href);
            if (response.status === 404 || response.redirected) {
                // It is gone, or whoever looks is logged out: say so.
                location.reload();
            } else if (response.ok) {
                const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
                for (const part of document.querySelectorAll("[data-live]")) {
                    put(part, fresh.getElementById(part.id));
                }
                main.toggleAttribute("data-changing", "changing" in fresh.getElementById("main").dataset);
            }
        } catch {
            // The server is away for a moment; what is shown stays, and is asked for again.
        } finally {
            isAsking = false;
        }
    }

    setInterval(look, SECONDS * 1000);
    document.addEventListener("visibilitychange", look);
})();
