package main

import (
	"errors"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"derpd/certs"
	"derpd/relay/admit"
)

// environment is every variable that derpd reads, as it is given: config.go
// turns it into typed, valid values. It is the documentation too: `derpd env`,
// docker/env.example and the tables in both READMEs are made from its tags.
type environment struct {
	Domain  string `env:"DERP_DOMAIN" en:"DNS names or IP addresses of this node, comma-separated; the first is the HostName in the map" zh:"本节点的域名或 IP 地址，逗号分隔；第一个是 DERPMap 里的 HostName" or:"none: a pinned certificate on the public address found" zhor:"无：在找到的公网地址上使用 pinned 证书"`
	Addr    string `env:"DERP_ADDR,default=:443" en:"HTTPS listen address, host:port" zh:"HTTPS 监听地址，host:port"`
	HTTP    string `env:"DERP_HTTP_PORT" en:"plain HTTP port, for the captive portal check and ACME's HTTP-01; -1 is off" zh:"明文 HTTP 端口，用于强制门户检测和 ACME HTTP-01；-1 为关闭" or:"80; -1 when DERP_CERT_MODE is off" zhor:"80；DERP_CERT_MODE 为 off 时是 -1"`
	STUN    string `env:"DERP_STUN,default=true" en:"whether to answer STUN" zh:"是否提供 STUN"`
	STUNUDP string `env:"DERP_STUN_PORT,default=3478" en:"STUN port, UDP" zh:"STUN 的 UDP 端口"`
	STUNIP  string `env:"DERP_STUN_ADDR" en:"host or address that STUN listens on (fly-global-services on Fly.io)" zh:"STUN 监听的主机名或地址（Fly.io 上是 fly-global-services）" or:"the host of DERP_ADDR" zhor:"DERP_ADDR 的主机部分"`
	Health  string `env:"DERP_HEALTH_ADDR" en:"where a platform's health check may ask GET /readyz: ready or not ready, and nothing else" zh:"供平台健康检查询问 GET /readyz 的监听地址：只回答就绪或未就绪" or:"none; on Fly.io :8081, on Railway :PORT" zhor:"无；Fly.io 上是 :8081，Railway 上是 :PORT"`
	Admin   string `env:"DERP_ADMIN_ADDR,default=127.0.0.1:9090" en:"where health is served; never on the public listener" zh:"健康检查的监听地址；不会出现在公网端口上"`

	Congestion string `env:"DERP_TCP_CONGESTION" en:"congestion control of clients' connections, such as bbr; the kernel must have it" zh:"客户端连接使用的 TCP 拥塞控制算法，例如 bbr；内核必须支持" or:"the kernel's" zhor:"内核的默认值"`

	DataDir string `env:"DERP_DATA_DIR,default=/data" en:"where the node key is kept" zh:"保存节点密钥的目录"`
	CertDir string `env:"DERP_CERT_DIR" en:"where certificates and ACME accounts are kept" zh:"保存证书和 ACME 账户的目录" or:"certs in DERP_DATA_DIR" zhor:"DERP_DATA_DIR 下的 certs"`

	CertMode   string `env:"DERP_CERT_MODE" en:"letsencrypt (any ACME authority), manual (files), pinned (self-signed, its hash in the map), off (something else terminates TLS); gcp is letsencrypt with Google's authority" zh:"letsencrypt（任意 ACME 机构）、manual（证书文件）、pinned（自签名，哈希写进 DERPMap）、off（由别的程序终结 TLS）；gcp 即使用 Google 机构的 letsencrypt" or:"letsencrypt if DERP_DOMAIN starts with a name, else pinned" zhor:"DERP_DOMAIN 以域名开头时为 letsencrypt，否则为 pinned"`
	CertFile   string `env:"DERP_CERT_FILE" en:"manual: certificate file, PEM, leaf first and then its issuers" zh:"manual 模式：证书文件，PEM，先叶子证书，再各级签发者" or:"NAME.crt in DERP_CERT_DIR" zhor:"DERP_CERT_DIR 下的 NAME.crt"`
	KeyFile    string `env:"DERP_KEY_FILE" en:"manual: private key file, PEM" zh:"manual 模式：私钥文件，PEM" or:"NAME.key in DERP_CERT_DIR" zhor:"DERP_CERT_DIR 下的 NAME.key"`
	ACMECA     string `env:"DERP_ACME_CA" en:"letsencrypt, letsencrypt-staging, zerossl, google, or the https URL of a directory" zh:"letsencrypt、letsencrypt-staging、zerossl、google，或 ACME 目录的 https 网址" or:"letsencrypt" zhor:"letsencrypt"`
	ACMERoots  string `env:"DERP_ACME_CA_ROOTS" en:"file of the roots of a private authority, PEM; DERP_MESH_WITH trusts them too" zh:"私有机构根证书的文件，PEM；DERP_MESH_WITH 也信任它们"`
	ACMEEmail  string `env:"DERP_ACME_EMAIL" en:"address for the authority's notices" zh:"接收机构通知的邮箱"`
	ACMEKeyID  string `env:"DERP_ACME_EAB_KID" en:"external account binding: key ID" zh:"外部账户绑定：密钥 ID"`
	ACMEKey    string `env:"DERP_ACME_EAB_KEY" en:"external account binding: MAC key, base64" zh:"外部账户绑定：MAC 密钥，base64" secret:"true"`
	Challenges string `env:"DERP_ACME_CHALLENGES" en:"which challenges may be used: http, tls-alpn, dns; the others beside dns are tried when it fails, and for addresses" zh:"可以使用的验证方式：http、tls-alpn、dns；和 dns 一起写的其他方式在 dns 失败时以及对 IP 地址使用" or:"http,tls-alpn; dns if DERP_DNS_PROVIDER is set" zhor:"http,tls-alpn；设置了 DERP_DNS_PROVIDER 时为 dns"`

	DNS          string `env:"DERP_DNS_PROVIDER" en:"DNS-01 through the API of whoever serves the domain's DNS: acmedns, alidns, cloudflare, desec, digitalocean, duckdns, gandi, godaddy, hetzner, namecheap, ovh, porkbun, rfc2136, route53 or tencentcloud, with its own variables, below" zh:"通过域名的 DNS 服务商的 API 做 DNS-01 验证：acmedns、alidns、cloudflare、desec、digitalocean、duckdns、gandi、godaddy、hetzner、namecheap、ovh、porkbun、rfc2136、route53 或 tencentcloud，各自的变量见下文"`
	DNSResolvers string `env:"DERP_DNS_RESOLVERS" en:"DNS-01: servers, HOST:PORT,…, that are asked for the zone and whether the record is there" zh:"DNS-01：询问区域以及记录是否已生效的服务器，HOST:PORT,…" or:"the system's for the zone, the zone's own for the record" zhor:"区域问系统的，记录问区域自己的"`
	DNSTimeout   string `env:"DERP_DNS_PROPAGATION_TIMEOUT,default=2m" en:"DNS-01: how long to wait until the record is there; 0 does not look" zh:"DNS-01：等待记录生效的最长时间；0 表示不检查"`
	DNSDelegate  string `env:"DERP_DNS_DELEGATE" en:"DNS-01: the name, in a zone of the provider, to which _acme-challenge of each domain is a CNAME" zh:"DNS-01：服务商处某个区域里的名称，各域名的 _acme-challenge 都是指向它的 CNAME"`

	Verify      string `env:"DERP_VERIFY_CLIENTS,default=auto" en:"auto: the tailscaled socket if it is there; true: the socket, and nobody while it does not answer; false: not the socket" zh:"auto：tailscaled 的 socket 存在就用；true：必须用 socket，它不回答就谁也不放行；false：不用 socket"`
	Socket      string `env:"DERP_TAILSCALED_SOCKET,default=/var/run/tailscale/tailscaled.sock" en:"tailscaled sockets, one for each tailnet, comma-separated" zh:"tailscaled 的 socket，每个 tailnet 一个，逗号分隔"`
	VerifyURL   string `env:"DERP_VERIFY_CLIENT_URL" en:"admission URLs, comma-separated (Headscale's /verify)" zh:"准入网址，逗号分隔（Headscale 的 /verify）" secret:"url"`
	FailOpen    string `env:"DERP_VERIFY_CLIENT_URL_FAIL_OPEN,default=false" en:"true: anybody may connect while an admission URL cannot be reached, as derper does by default" zh:"true：准入网址无法访问时任何人都可以连接（derper 的默认行为）"`
	AllowKeys   string `env:"DERP_ALLOW_KEYS" en:"node keys (nodekey:…) that may connect, or the path of a file of them, read again when it changes" zh:"允许连接的节点公钥（nodekey:…），或存放它们的文件路径，文件改动后自动重读"`
	APIKey      string `env:"DERP_TAILNET_API_KEY" en:"Tailscale API access token (tskey-api-…): the devices of its tailnet may connect; several, comma-separated" zh:"Tailscale API 访问令牌（tskey-api-…）：其 tailnet 的设备可以连接；可以有多个，逗号分隔" secret:"true"`
	OAuthID     string `env:"DERP_TAILNET_OAUTH_CLIENT_ID" en:"the same with an OAuth client with the scope devices:core:read, which does not expire; several, comma-separated" zh:"同上，使用带 devices:core:read 权限、不会过期的 OAuth 客户端；可以有多个，逗号分隔"`
	OAuthSecret string `env:"DERP_TAILNET_OAUTH_CLIENT_SECRET" en:"the secrets of the OAuth clients, in the same order" zh:"OAuth 客户端的密钥，顺序相同" secret:"true"`
	Tailnet     string `env:"DERP_TAILNET" en:"names of the tailnets, one for each API key and then for each OAuth client" zh:"tailnet 的名称，先按 API 令牌、再按 OAuth 客户端的顺序各一个" or:"the credential's own" zhor:"凭据自己的 tailnet"`
	APIURL      string `env:"DERP_TAILNET_API_URL,default=https://api.tailscale.com" en:"where Tailscale's API is asked, for a proxy of yours that can reach it" zh:"Tailscale API 的网址，用于你自己的、能访问它的代理" secret:"url"`
	External    string `env:"DERP_TAILNET_EXTERNAL,default=false" en:"whether devices that others share into the tailnet may connect too" zh:"别人共享进 tailnet 的设备是否也可以连接"`
	Grace       string `env:"DERP_VERIFY_GRACE,default=24h" en:"how long an admitted node stays welcome while a source of admission does not answer; 0 is not at all" zh:"准入来源不回答时，已放行过的节点在多长时间内仍可连接；0 表示不可"`
	Interval    string `env:"DERP_VERIFY_INTERVAL,default=1m" en:"how often connected nodes are asked about again, and Tailscale's API for its devices, which is asked every 15s at most" zh:"多久重新核对一次已连接的节点，以及多久向 Tailscale API 查询一次设备（最短 15 秒一次）"`
	Disallow    string `env:"DERP_DISALLOW_APPS" en:"app names that may not connect, comma-separated" zh:"不允许连接的应用名，逗号分隔"`

	RegionID   string `env:"DERP_REGION_ID,default=900" en:"region in the map, 900 to 999" zh:"DERPMap 里的区域编号，900 到 999"`
	RegionCode string `env:"DERP_REGION_CODE,default=derpd" en:"short name of the region" zh:"区域短名"`
	RegionName string `env:"DERP_REGION_NAME,default=derpd" en:"name of the region for people" zh:"给人看的区域名"`
	NodeName   string `env:"DERP_NODE_NAME" en:"name of the node, unique over the whole map" zh:"节点名，在整个 DERPMap 里唯一" or:"DERP_REGION_ID and the letter a" zhor:"DERP_REGION_ID 加字母 a"`
	PublicV4   string `env:"DERP_PUBLIC_IPV4" en:"IPv4 address that clients dial; none if there is none" zh:"客户端连接的 IPv4 地址；没有就写 none" or:"found, without DERP_DOMAIN; else DNS" zhor:"没有 DERP_DOMAIN 时自动查找，否则用 DNS"`
	PublicV6   string `env:"DERP_PUBLIC_IPV6" en:"IPv6 address that clients dial; none if there is none" zh:"客户端连接的 IPv6 地址；没有就写 none" or:"found, without DERP_DOMAIN; else DNS" zhor:"没有 DERP_DOMAIN 时自动查找，否则用 DNS"`
	PublicTLS  string `env:"DERP_PUBLIC_PORT" en:"HTTPS port that clients dial, where it differs" zh:"客户端连接的 HTTPS 端口（与监听端口不同时）" or:"as listened; 443 when DERP_CERT_MODE is off" zhor:"同监听端口；DERP_CERT_MODE 为 off 时是 443"`
	PublicHTTP string `env:"DERP_PUBLIC_HTTP_PORT" en:"plain HTTP port as seen from outside, where it differs" zh:"从外面看到的明文 HTTP 端口（与监听端口不同时）" or:"as listened" zhor:"同监听端口"`
	PublicSTUN string `env:"DERP_PUBLIC_STUN_PORT" en:"STUN port that clients ask, where it differs; -1 to say there is none" zh:"客户端使用的 STUN 端口（与监听端口不同时）；-1 表示没有" or:"as listened" zhor:"同监听端口"`
	Discovery  string `env:"DERP_DISCOVERY,default=stun" en:"how the public address is found without DERP_DOMAIN: stun asks Tailscale's public STUN servers once, HOST:PORT,… asks others, off takes the outbound interface" zh:"没有 DERP_DOMAIN 时如何得知公网地址：stun 启动时询问一次 Tailscale 的公共 STUN 服务器，HOST:PORT,… 询问别的服务器，off 取出口网卡的地址"`

	MeshWith string `env:"DERP_MESH_WITH" en:"the nodes of this region, which then forward to each other, comma-separated: HOST[:PORT][/DIAL-ADDRESS][=sha256-raw:HASH]; this one may be among them" zh:"本区域的各个节点，它们会互相转发，逗号分隔：HOST[:PORT][/连接地址][=sha256-raw:哈希]；其中可以有本节点自己"`
	MeshKey  string `env:"DERP_MESH_KEY" en:"the secret that they share: 64 hex digits, or a passphrase of 20 characters or more without commas; two, comma-separated, while you change it: both are accepted" zh:"各节点共有的密钥：64 位十六进制数字，或至少 20 个字符、不含逗号的口令；更换期间可写两个，逗号分隔，两个都接受" secret:"true"`

	Trusted string `env:"DERP_TRUSTED_PROXIES" en:"addresses or networks of the proxies in front of derpd, comma-separated, that tell who the client is: in X-Forwarded-For, or with DERP_PROXY_PROTOCOL in a PROXY header instead; never name one that passes on what its clients tell" zh:"derpd 前面的代理的地址或网段，逗号分隔；它们用 X-Forwarded-For 说明客户端是谁，设置了 DERP_PROXY_PROTOCOL 时改用 PROXY 头；不要写会原样转发客户端自称地址的代理" or:"none" zhor:"无"`
	Proxied string `env:"DERP_PROXY_PROTOCOL,default=false" en:"whether connections of DERP_TRUSTED_PROXIES to the HTTPS and HTTP listeners may begin with a header of HAProxy's PROXY protocol, version 1 or 2; others that do are closed" zh:"来自 DERP_TRUSTED_PROXIES、到 HTTPS 和 HTTP 端口的连接是否可以以 HAProxy PROXY 协议（第 1 或第 2 版）的头开始；来自别处却带这种头的连接会被关闭"`

	Bootstrap string `env:"DERP_BOOTSTRAP_DNS" en:"names answered at /bootstrap-dns, comma-separated" zh:"/bootstrap-dns 回答的域名，逗号分隔"`
	Home      string `env:"DERP_HOME,default=blank" en:"what a browser sees: blank, page, or a URL to redirect to" zh:"浏览器看到的内容：blank、page，或要跳转到的网址"`
	LogLevel  string `env:"DERP_LOG_LEVEL,default=info" en:"debug, info, warn or error; debug names client addresses" zh:"debug、info、warn 或 error；debug 会写出客户端地址"`
	LogFormat string `env:"DERP_LOG_FORMAT" en:"json or console" zh:"json 或 console" or:"console on a terminal, else json" zhor:"在终端上为 console，否则为 json"`
}

// variable is one field of environment.
type variable struct {
	name     string
	value    string // as given, or the default
	fallback string // the default
	computed string // how the default is found, where it is not one value
	en, zh   string // what the variable means
	zhHow    string // computed, in Chinese
	secret   bool   // never shown
	url      bool   // shown without what may be secret in it
	provider string // whose credential it is, of DERP_DNS_PROVIDER
	required bool   // by its provider
}

// credentialName is the variable of one credential of a DNS provider.
func credentialName(provider, field string) string {
	return "DERP_DNS_" + strings.ToUpper(provider) + "_" + field
}

// credentialVariables lists the credentials of all DNS providers. The table in
// package certs is their documentation.
func credentialVariables() []variable {
	var list []variable
	for _, p := range certs.DNSProviders {
		for _, c := range p.Credentials {
			list = append(list, variable{
				name:     credentialName(p.Name, c.Field),
				fallback: c.Default,
				en:       c.English,
				zh:       c.Chinese,
				secret:   c.Secret,
				provider: p.Name,
				required: c.Required,
			})
		}
	}
	return list
}

// variables lists the fields of e in the order of the documentation.
func (e environment) variables() []variable {
	v := reflect.ValueOf(e)
	list := make([]variable, v.NumField())
	for i, field := range reflect.VisibleFields(v.Type()) {
		name, fallback, _ := strings.Cut(field.Tag.Get("env"), ",default=")
		list[i] = variable{
			name:     name,
			value:    v.Field(i).String(),
			fallback: fallback,
			computed: field.Tag.Get("or"),
			en:       field.Tag.Get("en"),
			zh:       field.Tag.Get("zh"),
			zhHow:    field.Tag.Get("zhor"),
			secret:   field.Tag.Get("secret") == "true",
			url:      field.Tag.Get("secret") == "url",
		}
	}
	return list
}

// fill sets every field, which variables has listed, to its value or the default.
func (e *environment) fill(variables []variable, values map[string]string) {
	fields := reflect.ValueOf(e).Elem()
	for i, v := range variables {
		value, given := values[v.name]
		if !given {
			value = v.fallback
		}
		fields.Field(i).SetString(value)
	}
}

// shown is the value without its secrets.
func (v variable) shown() string {
	switch {
	case v.value == "":
		return ""
	case v.secret, strings.Contains(v.value, "privkey:"): // a key in the wrong place is one all the same
		return "(secret)"
	case strings.ContainsAny(v.value, "\r\n"):
		return strconv.Quote(v.value)
	case v.url:
		targets := splitList(v.value)
		for i, target := range targets {
			targets[i] = admit.RedactURL(target)
		}
		return strings.Join(targets, ",")
	}
	return v.value
}

// derperDebug are variables with our prefix that upstream's own code reads.
var derperDebug = []string{"DERP_DEBUG_LOGS", "DERP_PROBER_DEBUG_LOGS"}

// injected recognises what Docker links and Kubernetes put into the environment
// of a container that has a service called derp, or derp-something, beside it.
func injected(name, value string, known bool) bool {
	for _, scheme := range []string{"tcp://", "udp://", "sctp://"} {
		if strings.HasPrefix(value, scheme) {
			return true
		}
	}
	return !known && injectedName().MatchString(name)
}

var injectedName = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`^DERP_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?|ENV_\w+|NAME)$`)
})

// loaded is the environment as it was found.
type loaded struct {
	environment

	// fromFile holds the path for each variable that was given as X_FILE.
	fromFile map[string]string

	// given tells what was set from what is a default.
	given map[string]bool

	// platform is where derpd runs, if that is known, and assumed are the
	// variables that it filled; they are not given.
	platform *platform
	assumed  []string

	// credentials are the given credentials of DNS providers, by variable.
	credentials map[string]string

	// ignored are variables that Docker or Kubernetes injected.
	ignored []string
}

// loadEnvironment reads "NAME=value" pairs. A variable that is set but empty
// counts as unset, since compose files pass variables on that way.
func loadEnvironment(pairs []string) (*loaded, error) {
	variables, credentials := (environment{}).variables(), credentialVariables()
	known := make(map[string]bool)
	for _, v := range slices.Concat(variables, credentials) {
		known[v.name] = true
	}
	l := &loaded{fromFile: make(map[string]string), given: make(map[string]bool), credentials: make(map[string]string)}
	values, outside := make(map[string]string), make(map[string]string)
	var errs []error
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		if !strings.HasPrefix(name, "DERP_") {
			outside[name] = value
		}
		if !strings.HasPrefix(name, "DERP_") || value == "" || slices.Contains(derperDebug, name) {
			continue
		}
		target, isFile := strings.CutSuffix(name, "_FILE")
		switch {
		case injected(name, value, known[name]):
			l.ignored = append(l.ignored, name)
		case known[name]:
			values[name] = value
		case isFile && known[target]:
			l.fromFile[target] = value
		default:
			errs = append(errs, fmt.Errorf("%s: unknown variable%s", name, suggestion(name, known)))
		}
	}
	for name, path := range l.fromFile {
		if _, both := values[name]; both {
			errs = append(errs, fmt.Errorf("%s: set beside %s_FILE; want one of them", name, name))
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s_FILE: %w%s", name, err, secretHint(err)))
			continue
		}
		// The newline that an editor leaves is not part of a secret.
		values[name] = strings.TrimRight(string(data), "\r\n")
		if values[name] == "" {
			errs = append(errs, fmt.Errorf("%s_FILE: %s is empty", name, path))
		}
	}
	for name := range values {
		l.given[name] = true
	}
	for _, v := range credentials {
		if l.given[v.name] {
			l.credentials[v.name] = values[v.name]
		}
	}
	if l.platform = detect(outside, values); l.platform != nil {
		l.assumed = l.platform.assume(values)
	}
	l.fill(variables, values)
	// Maps have no order; messages should.
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return l, errors.Join(errs...)
}

func secretHint(err error) string {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Sprintf("; derpd runs as uid %d, which must be able to read it (a secret with mode 0600 that root owns cannot be)", os.Getuid())
	}
	return ""
}

// elsewhere are variables of other images, and what they are called here.
var elsewhere = map[string]string{
	"DERP_HOSTNAME": "DERP_DOMAIN",
	"DERP_HOST":     "DERP_DOMAIN",
	"DERP_CERTS":    "DERP_CERT_DIR",
}

// suggestion names the known variable that is nearest to name, if one is near.
func suggestion(name string, known map[string]bool) string {
	if here, ok := elsewhere[name]; ok {
		return "; here it is " + here
	}
	best, bestDistance := "", 4
	for candidate := range known {
		for _, form := range []string{candidate, candidate + "_FILE"} {
			d := distance(name, form)
			if d < bestDistance || d == bestDistance && best != "" && form < best {
				best, bestDistance = form, d
			}
		}
	}
	if best == "" {
		return "; `derpd env` lists the ones there are"
	}
	return "; did you mean " + best + "?"
}

// distance is the number of letters to insert, delete or replace to get from
// a to b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// splitList splits a comma-separated list, and drops what is empty.
func splitList(s string) []string {
	var list []string
	for _, item := range strings.Split(s, ",") {
		if item = strings.TrimSpace(item); item != "" {
			list = append(list, item)
		}
	}
	return list
}
