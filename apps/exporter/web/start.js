"use strict";

// Browsers do not load modules and models from file: addresses, so explain what to do.
if (location.protocol === "file:") {
  document.addEventListener("DOMContentLoaded", () => {
    document.getElementById("file_help").hidden = false;
    document.querySelector("main").hidden = true;
    document.querySelector("footer").hidden = true;
  });
}
