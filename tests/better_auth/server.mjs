// A real Better Auth server for the tests. It is configured by environment:
//   MODE               jwks (EdDSA key set) | hs256 (own jwt.sign; the session_data cookie is a JWT, too)
//   PORT               0 or unset: any free one
//   DATABASE_URL       PostgreSQL; the tables go into the schema "better_auth"
//   EXPIRES            how long a token is valid: 15m by default
//   TRUSTED_ORIGINS    comma-separated; these origins also get CORS headers
//   BETTER_AUTH_SECRET, BETTER_AUTH_SECRETS ("2:new,1:old") are read by Better Auth itself
// When ready it prints one line: {"url": "http://127.0.0.1:PORT"}
import { once } from "node:events";
import { createServer } from "node:http";
import { betterAuth } from "better-auth";
import { signJWT } from "better-auth/crypto";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";
import pg from "pg";

const { MODE = "jwks", PORT = "0", DATABASE_URL, EXPIRES = "15m", TRUSTED_ORIGINS = "" } = process.env;
const trustedOrigins = TRUSTED_ORIGINS.split(",").filter(Boolean);

// Listen first: the base URL, which is also the tokens' iss and aud, holds the port.
const server = createServer();
await once(server.listen(Number(PORT), "127.0.0.1"), "listening");
const baseURL = `http://127.0.0.1:${server.address().port}`;

const modes = {
  jwks: () => ({ plugins: [jwt({ jwt: { expirationTime: EXPIRES } })] }),
  hs256: () => ({
    session: { cookieCache: { enabled: true, strategy: "jwt", maxAge: 300 } },
    plugins: [
      jwt({
        // Both are required with jwt.sign; /jwks then answers 404.
        jwks: { remoteUrl: `${baseURL}/no-jwks`, keyPairConfig: { alg: "EdDSA" } },
        jwt: {
          // context.secret is BETTER_AUTH_SECRET, or the first of BETTER_AUTH_SECRETS.
          sign: async (payload) => signJWT(payload, (await auth.$context).secret, payload.exp - payload.iat),
        },
      }),
    ],
  }),
};

const database = new pg.Pool({
  connectionString: DATABASE_URL,
  options: "-c search_path=better_auth",
});
await database.query("CREATE SCHEMA IF NOT EXISTS better_auth");

const auth = betterAuth({
  baseURL,
  database,
  trustedOrigins,
  emailAndPassword: { enabled: true },
  rateLimit: { enabled: false },
  telemetry: { enabled: false },
  advanced: { disableOriginCheck: false }, // else NODE_ENV=test or TEST=1 would turn it off
  ...modes[MODE](),
});
await (await getMigrations(auth.options)).runMigrations();

const handle = toNodeHandler(auth);
server.on("request", (req, res) => {
  if (trustedOrigins.includes(req.headers.origin)) {
    res.setHeader("Access-Control-Allow-Origin", req.headers.origin);
    res.setHeader("Access-Control-Allow-Credentials", "true");
    res.setHeader("Access-Control-Allow-Headers", "content-type");
    res.setHeader("Vary", "Origin");
  }
  if (req.method === "OPTIONS") res.writeHead(204).end();
  else handle(req, res);
});
console.log(JSON.stringify({ url: baseURL }));
