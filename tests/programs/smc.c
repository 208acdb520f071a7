/* Stands in for smc_run and smc_pnet of smc-tools, which Debian does not have: for scripts/vmlab peers.
 *
 * As a preload, its socket() makes an SMC socket of what would be a TCP socket. Built with -DPNETID it is a program,
 * `pnetid NETDEV RDMA-DEVICE`, that tells the kernel that both are of one network; so SMC-R may come about over a
 * device's loopback, where the kernel's route leads over lo and names no RDMA device. It also adds an EID, without which
 * there is no SMC-R version 2, the only one whose packets Soft-RoCE has.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#ifndef PNETID

int socket(int domain, int type, int protocol)
{
	int (*next)(int, int, int) = dlsym(RTLD_NEXT, "socket");
	int inet = domain == AF_INET || domain == AF_INET6;
	int tcp = (type & 0xf) == SOCK_STREAM && (protocol == 0 || protocol == IPPROTO_TCP);

	/* SMCPROTO_SMC is 0, SMCPROTO_SMC6 is 1. */
	return inet && tcp ? next(AF_SMC, type, domain == AF_INET6) : next(domain, type, protocol);
}

#else

#include <linux/genetlink.h>
#include <linux/netlink.h>
#include <linux/smc.h>
#include <unistd.h>

struct request {
	struct nlmsghdr head;
	struct genlmsghdr genl;
	char attributes[256];
};

static void add(struct request *r, int type, const void *bytes, size_t length)
{
	struct nlattr *attribute = (void *)((char *)r + NLMSG_ALIGN(r->head.nlmsg_len));

	attribute->nla_type = type;
	attribute->nla_len = NLA_HDRLEN + length;
	memcpy((char *)attribute + NLA_HDRLEN, bytes, length);
	r->head.nlmsg_len = NLMSG_ALIGN(r->head.nlmsg_len) + NLA_ALIGN(attribute->nla_len);
}

static void begin(struct request *r, int family, int command)
{
	memset(r, 0, sizeof(*r));
	r->head.nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN);
	r->head.nlmsg_type = family;
	r->head.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
	r->genl.cmd = command;
	r->genl.version = 1;
}

/* The kernel's errno, or 0; of an answer with attributes, the family's number into *family. */
static int ask(int fd, struct request *r, int *family)
{
	char answer[8192];
	ssize_t got;

	if (send(fd, r, r->head.nlmsg_len, 0) < 0)
		return -1;
	while ((got = recv(fd, answer, sizeof(answer), 0)) > 0) {
		struct nlmsghdr *head = (void *)answer;

		for (; NLMSG_OK(head, got); head = NLMSG_NEXT(head, got)) {
			char *at = (char *)head + NLMSG_LENGTH(GENL_HDRLEN);
			char *end = (char *)head + head->nlmsg_len;

			if (head->nlmsg_type == NLMSG_ERROR)
				return -((struct nlmsgerr *)NLMSG_DATA(head))->error;
			for (; at < end; at += NLA_ALIGN(((struct nlattr *)at)->nla_len))
				if (((struct nlattr *)at)->nla_type == CTRL_ATTR_FAMILY_ID)
					*family = *(unsigned short *)(at + NLA_HDRLEN);
		}
	}
	return -1;
}

static int find(int fd, const char *name, size_t length, int *family)
{
	struct request r;

	begin(&r, GENL_ID_CTRL, CTRL_CMD_GETFAMILY);
	add(&r, CTRL_ATTR_FAMILY_NAME, name, length);
	return ask(fd, &r, family);
}

static int join_network(int fd, const char *netdev, const char *device)
{
	unsigned char port = 1;
	struct request r;
	int family = 0, error = find(fd, SMCR_GENL_FAMILY_NAME, sizeof(SMCR_GENL_FAMILY_NAME), &family);

	begin(&r, family, SMC_PNETID_ADD);
	add(&r, SMC_PNETID_NAME, "VMLAB", sizeof("VMLAB"));
	add(&r, SMC_PNETID_ETHNAME, netdev, strlen(netdev) + 1);
	add(&r, SMC_PNETID_IBNAME, device, strlen(device) + 1);
	add(&r, SMC_PNETID_IBPORT, &port, sizeof(port));
	return error ? error : ask(fd, &r, &family);
}

static int add_eid(int fd)
{
	struct request r;
	int family = 0, error = find(fd, SMC_GENL_FAMILY_NAME, sizeof(SMC_GENL_FAMILY_NAME), &family);

	/* As long as it may be, with blanks. */
	begin(&r, family, SMC_NETLINK_ADD_UEID);
	add(&r, SMC_NLA_EID_TABLE_ENTRY, "VSOCKET.VMLAB                   ", SMC_MAX_EID_LEN + 1);
	return error ? error : ask(fd, &r, &family);
}

int main(int count, char **words)
{
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC), error;

	if (count != 3) {
		fprintf(stderr, "usage: pnetid NETDEV RDMA-DEVICE\n");
		return 2;
	}
	error = join_network(fd, words[1], words[2]);
	if (!error)
		error = add_eid(fd);
	if (error)
		fprintf(stderr, "pnetid: %s\n", error > 0 ? strerror(error) : "no answer");
	return error != 0;
}

#endif
