// Sets up Swagger UI on its page. A token that is pasted under "Authorize" is kept in the page's memory only.
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

function userOf(token) {
  try {
    const payload = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
    const claims = JSON.parse(new TextDecoder().decode(Uint8Array.from(payload, (byte) => byte.charCodeAt())));
    return claims.sub ?? claims.user?.id; // the default of JWT_USER_CLAIM
  } catch {
    return undefined; // not a JWT: the server's answer says so
  }
}

// The user's id is one value, which all requests on the page share.
function setUser({ specActions, specSelectors }, user) {
  for (const [path, item] of specSelectors.specJson().get("paths").entrySeq()) {
    if (!path.includes("{user_id}")) continue;
    for (const method of item.keySeq()) specActions.changeParam([path, method], "user_id", "path", user);
  }
}

// After Authorize: closes the dialog, fills in the user's id and opens the first request.
const authorize = (original, system) => (payload) => {
  const { bearer } = payload;
  const token = (bearer?.value ?? "").trim().replace(/^Bearer\s+/i, "");
  original({ ...payload, bearer: { ...bearer, value: token } });
  const user = userOf(token);
  if (typeof user === "string") setUser(system, user);
  system.authActions.showDefinitions(false);
  system.layoutActions.show(["operations", "tasks", "list_tasks"], true);
};

const changeParam = (original, system) => (path, parameter, value, isXml) =>
  parameter.get("name") === "user_id" ? setUser(system, value) : original(path, parameter, value, isXml);

// Folds the description of an error to one line.
const foldErrors = (Response, { React: { createElement } }) => (props) => {
  const row = createElement(Response, props);
  if (props.code < "400") return row;
  const line = `${props.code} ${props.response.get("description").replaceAll("`", "")}`;
  const table = createElement("table", null, createElement("tbody", null, row));
  const fold = createElement("details", null, createElement("summary", null, line), table);
  return createElement("tr", null, createElement("td", { colSpan: 3 }, fold));
};

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#docs",
  validatorUrl: null, // the default sends the document to another host
  persistAuthorization: false,
  tryItOutEnabled: true,
  plugins: [
    {
      statePlugins: {
        auth: { wrapActions: { authorize } },
        spec: { wrapActions: { changeParamByIdentity: changeParam } },
      },
      wrapComponents: { response: foldErrors },
    },
  ],
});
