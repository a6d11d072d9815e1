// Caches that people put before a registry, beside nginx and squid of interop.ts: Varnish, Apache's
// mod_cache and Traffic Server, each as its documentation begins.
import { chmodSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { interopFolder, type Program, startOnFreePort, writeFiles } from "./interop.ts";
import { ProxyService, whenListening } from "./interop-proxies.ts";

export interface VarnishRules {
  /** VCL for what came from the registry, and for what goes out. */
  fetched?: string;
  delivered?: string;
}

export function startVarnish(
  upstreamPort: number,
  rules: VarnishRules = {},
): Promise<ProxyService> {
  const folder = interopFolder("varnish");
  return startOnFreePort((port) => {
    const { "default.vcl": config } = writeFiles(folder, {
      "default.vcl": `vcl 4.1;
backend default {
  .host = "127.0.0.1";
  .port = "${upstreamPort}";
}
sub vcl_backend_response {
  ${rules.fetched ?? ""}
}
sub vcl_deliver {
  ${rules.delivered ?? ""}
}
`,
    });
    const where = ["-n", join(folder, "work"), "-a", `127.0.0.1:${port}`, "-T", "none"];
    const program: Program = {
      name: "varnishd",
      folder,
      command: ["varnishd", "-F", "-j", "none", ...where, "-f", config, "-s", "malloc,256m"],
      ready: /Child launched OK|Child \(\d+\) said Child starts/,
      stopSignal: "SIGTERM",
    };
    return new ProxyService(program, port);
  }).then(whenListening);
}

/** mod_cache on disk before mod_proxy; it says X-Cache, and keeps nothing that it got in ranges. */
export function startApache(upstreamPort: number): Promise<ProxyService> {
  const folder = interopFolder("apache");
  const cacheRoot = join(folder, "cache");
  mkdirSync(cacheRoot);
  // The processes that answer are not root's.
  chmodSync(folder, 0o755);
  chmodSync(cacheRoot, 0o777);
  const modules = ["mpm_event", "authz_core", "proxy", "proxy_http", "cache", "cache_disk"]
    .map((name) => `LoadModule ${name}_module /usr/lib/apache2/modules/mod_${name}.so`)
    .join("\n");
  return startOnFreePort((port) => {
    const { "apache.conf": config } = writeFiles(folder, {
      "apache.conf": `${modules}
ServerRoot ${folder}
ServerName localhost
Listen 127.0.0.1:${port}
PidFile ${join(folder, "pid")}
User www-data
Group www-data
ErrorLog /dev/stderr
LogLevel notice
CacheRoot ${cacheRoot}
CacheEnable disk /
CacheHeader on
CacheMaxFileSize 268435456
ProxyPass / http://127.0.0.1:${upstreamPort}/
`,
    });
    const program: Program = {
      name: "apache2",
      folder,
      command: ["apache2", "-f", config, "-DFOREGROUND"],
      ready: /resuming normal operations/,
      stopSignal: "SIGTERM",
    };
    return new ProxyService(program, port);
  });
}

/** Its defaults, but all that it reads and writes is in its own folder. */
export function startTrafficServer(upstreamPort: number): Promise<ProxyService> {
  const folder = interopFolder("trafficserver");
  const layout: Record<string, string> = {
    prefix: folder,
    exec_prefix: "/usr",
    bindir: "/usr/bin",
    sbindir: "/usr/sbin",
    includedir: "/usr/include",
    libdir: "/usr/lib/trafficserver",
    libexecdir: "/usr/lib/trafficserver/modules",
  };
  for (const name of [
    "sysconfdir",
    "datadir",
    "localstatedir",
    "runtimedir",
    "logdir",
    "cachedir",
  ]) {
    layout[name] = join(folder, name);
    mkdirSync(join(folder, name));
  }
  const settings = layout.sysconfdir as string;
  writeFiles(folder, {
    "runroot.yaml": Object.entries(layout)
      .map(([name, place]) => `${name}: ${place}\n`)
      .join(""),
  });
  return startOnFreePort((port) => {
    writeFiles(settings, {
      "records.config": `CONFIG proxy.config.http.server_ports STRING ${port}:ip-in=127.0.0.1
CONFIG proxy.config.admin.user_id STRING #-1
`,
      "ip_allow.yaml": `ip_allow:
  - apply: in
    ip_addrs: 127.0.0.1
    action: allow
    methods: ALL
`,
      "remap.config": `map / http://127.0.0.1:${upstreamPort}/\n`,
      "storage.config": `${layout.cachedir} 256M\n`,
    });
    const program: Program = {
      name: "traffic_server",
      folder,
      command: ["sh", "-c", `echo starting; exec traffic_server --run-root=${folder}`],
      ready: /starting/,
      stopSignal: "SIGTERM",
    };
    return new ProxyService(program, port);
  }).then(whenListening);
}
